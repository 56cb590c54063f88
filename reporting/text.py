"""Format numbers and settings, and make text safe to show on a terminal or in Markdown."""

import json
import math
import re
import statistics
from collections.abc import Collection, Iterable
from typing import Any

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"

# ---- Numbers ------------------------------------------------------------------------------------


def signed(value: float | None, digits: int = 2) -> str:
    """Format with a sign (and a real minus); zero after rounding has none, None is a dash."""
    if value is None:
        return DASH
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"+{text}" if value > 0 else f"{MINUS}{text}"


def interval(low: float | None, high: float | None, digits: int = 2) -> str:
    if low is None or high is None:
        return DASH
    return f"{signed(low, digits)} to {signed(high, digits)}"


def p_value(p: float | None) -> str:
    """Format p for a table, without an equals sign."""
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_in_words(p: float) -> str:
    """`p < 0.001` or `p = 0.03`."""
    return f"p {'' if p < 0.001 else '= '}{p_value(p)}"


def mean_and_sd(values: Collection[float]) -> str:
    """Mean ± sample standard deviation, or just the value if there is only one."""
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def by_seed(scores: dict[int, float], same_seeds: bool) -> str:
    """The individual values, labeled by seed unless all variants have the ``same_seeds``."""
    if same_seeds:
        return ", ".join(f"{value:.2f}" for value in scores.values())
    return ", ".join(f"{seed}: {value:.2f}" for seed, value in scores.items())


def against(ours: float, printed: float) -> str:
    """Our value, the paper's, and the difference."""
    return f"{ours:.2f} / {printed} ({signed(ours - printed)})"


def gflops(flops: float) -> str:
    return f"{flops / 1e9:.3g}"


def count(n: int, what: str) -> str:
    """A number and its noun, with a plural s unless the number is one."""
    return f"{n} {what}{'' if n == 1 else 's'}"


# ---- Names and settings -------------------------------------------------------------------------


def commit(name: str) -> str:
    """The first ten digits of a commit, and the suffix if the working tree was not clean."""
    digits, _, state = name.partition("-")
    return f"{digits[:10]}{'-' if state else ''}{state}"


def dataset(name: str) -> str:
    """The data set's name as its authors write it: `cifar100` as CIFAR-100."""
    return re.sub(r"^cifar(?=\d)", "CIFAR-", name)


def as_text(value: Any) -> str:
    """A setting's value as written in an override."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


def rounded(values: Iterable[str]) -> dict[str, str]:
    """Map values of one setting to how they are shown: numbers rounded to four digits.

    If rounding would make two values equal, all are shown in full.
    """
    # Imported here because the commands' --help loads this file and should need no library.
    from training.variants import few_digits

    values = list(values)
    shown = {value: few_digits(value) for value in values}
    return shown if len(set(shown.values())) == len(shown) else {v: v for v in values}


def short(key: str) -> str:
    """A setting's name without its group, if that is unambiguous."""
    return key.removeprefix("attention.").removeprefix("optim.")


def short_name(name: str) -> str:
    """Shorten `optim._target_` to optimizer and `torch.optim.SGD` to SGD; numbers stay."""
    if name.endswith("._target_"):
        group = name.partition(".")[0]
        return "optimizer" if group == "optim" else group
    return name.rpartition(".")[2] if name.startswith(("torch.", "training.")) else name


def first_few(items: Iterable[str], most: int = 5) -> str:
    """The first ``most`` items, comma-separated, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def natural(text: str) -> list[tuple[float, str]]:
    """A sort key that puts dk=8 before dk=16."""

    def part(word: str) -> tuple[float, str]:
        try:
            return float(word), ""
        except ValueError:
            return math.inf, word

    return [part(word) for word in text.replace("=", " ").split()]


# ---- Text from outside --------------------------------------------------------------------------


def printable(text: str) -> str:
    """Make ``text`` safe for any UTF-8 file and terminal.

    Bytes that the locale could not decode (PEP 383) are decoded as UTF-8; those that cannot be, and
    control characters other than newline and tab, are written as escapes.
    """
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", _escape, text)
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    # C0 and C1 controls, and those that change the direction of writing.
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", _escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def csv_cell(text: str) -> str:
    """`printable`, with an apostrophe before text that a spreadsheet would run as a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def single_line(text: str) -> str:
    """`printable`, with each run of whitespace replaced by one space."""
    return printable(" ".join(text.split()))


def markdown(text: str) -> str:
    """Escape ``text`` as one line of Markdown for a paragraph, a list or a table.

    Characters that make up tables, HTML and links become entities, which work even if a parser
    ignores backslashes. An underscore inside a word has no meaning in Markdown and stays.
    """
    text = re.sub(r"[\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", single_line(text))
    # Characters that would start a list, a heading or a rule.
    text = re.sub(r"^(\d*)([-+#=](?=[-+#= ]|$)|(?<=\d)[.)](?= |$))", r"\1\\\2", text)
    return re.sub(r"&(?=[#A-Za-z])|[<>|]|:(?=//)|(?<=www)\.", _entity, text)


def _entity(match: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(match[0], f"&#{ord(match[0])};")
