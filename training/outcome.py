"""What can become of a job of a sweep."""

DONE = "done"
SKIPPED = "skipped"
STOPPED = "stopped"
DIVERGED = "diverged"
FAILED = "failed"
REFUSED = "refused"
NOT_BEGUN = "not begun"

# In the order in which they are counted.
ALL = (DONE, SKIPPED, STOPPED, DIVERGED, FAILED, REFUSED, NOT_BEGUN)
# Such a job has no result.
BAD = (DIVERGED, FAILED, REFUSED)
# The same command may give it one.
TO_BE_CONTINUED = (STOPPED, FAILED, NOT_BEGUN)


class JobError(Exception):
    """A job of a sweep has no result; the arguments are its outcome, and why in one line."""
