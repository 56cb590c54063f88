"""Numbers and settings as words, and text as it may be shown: on a terminal, in Markdown."""

import json
import math
import re
import statistics
from collections.abc import Collection, Iterable
from typing import Any

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"

# ---- Numbers ------------------------------------------------------------------------------------


def signed(value: float | None, digits: int = 2) -> str:
    """With its sign, a real minus; what rounds to zero has none. A dash where there is none."""
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
    """In a table, where an equals sign goes without saying."""
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_in_words(p: float) -> str:
    """`p < 0.001` or `p = 0.03`."""
    return f"p {'' if p < 0.001 else '= '}{p_value(p)}"


def mean_and_sd(values: Collection[float]) -> str:
    """Mean ± sample standard deviation; of a single value itself alone."""
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def by_seed(scores: dict[int, float], same_seeds: bool) -> str:
    """The single values; with their seeds unless all variants have the ``same_seeds``."""
    if same_seeds:
        return ", ".join(f"{value:.2f}" for value in scores.values())
    return ", ".join(f"{seed}: {value:.2f}" for seed, value in scores.items())


def against(ours: float, printed: float) -> str:
    """Our value, the paper's, and the difference."""
    return f"{ours:.2f} / {printed} ({signed(ours - printed)})"


def gflops(flops: float) -> str:
    return f"{flops / 1e9:.3g}"


def count(n: int, what: str) -> str:
    """A number and its noun, with an s for all but one."""
    return f"{n} {what}{'' if n == 1 else 's'}"


# ---- Names and settings -------------------------------------------------------------------------


def commit(name: str) -> str:
    """Its first ten digits, and whether the working tree was clean."""
    digits, _, state = name.partition("-")
    return f"{digits[:10]}{'-' if state else ''}{state}"


def dataset(name: str) -> str:
    """`cifar100` as its authors write it."""
    return re.sub(r"^cifar(?=\d)", "CIFAR-", name)


def as_text(value: Any) -> str:
    """A setting's value as its override is written."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)


def rounded(values: Iterable[str]) -> dict[str, str]:
    """How to show values of one setting: numbers with many digits, as searches draw them, to four.

    All as they are where that would make two of them alike.
    """
    # Not at the top: a command's --help reads this file, and needs no library.
    from training.variants import few_digits

    values = list(values)
    shown = {value: few_digits(value) for value in values}
    return shown if len(set(shown.values())) == len(shown) else {v: v for v in values}


def short(key: str) -> str:
    """A setting's name without its group, where that is clear."""
    return key.removeprefix("attention.").removeprefix("optim.")


def short_name(name: str) -> str:
    """`optim._target_` is the optimizer; `torch.optim.SGD` is SGD; numbers stay."""
    if name.endswith("._target_"):
        group = name.partition(".")[0]
        return "optimizer" if group == "optim" else group
    return name.rpartition(".")[2] if name.startswith(("torch.", "training.")) else name


def first_few(items: Iterable[str], most: int = 5) -> str:
    """The first of them, comma-separated, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def natural(text: str) -> list[tuple[float, str]]:
    """A key that sorts dk=8 before dk=16."""

    def part(word: str) -> tuple[float, str]:
        try:
            return float(word), ""
        except ValueError:
            return math.inf, word

    return [part(word) for word in text.replace("=", " ").split()]


# ---- Text that comes from outside ---------------------------------------------------------------


def printable(text: str) -> str:
    """``text`` as any UTF-8 file and terminal can have it.

    Bytes that the locale could not decode (PEP 383) are read as UTF-8; what is left of them, and
    control characters but the newline and the tab, are written as escapes.
    """
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", _escape, text)
    text = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    # C0 and C1, and those that turn the direction of writing.
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", _escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def csv_cell(text: str) -> str:
    """`printable`, with an apostrophe before what a spreadsheet would compute."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def single_line(text: str) -> str:
    """`printable`, with every run of white space as one space."""
    return printable(" ".join(text.split()))


def markdown(text: str) -> str:
    """One line of Markdown that shows ``text`` as it is, in a paragraph, a list or a table.

    Whatever a parser does with backslashes, entities stand for what tables, HTML and links are
    made of. An underscore inside of a word has no meaning and stays.
    """
    text = re.sub(r"[\\`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", single_line(text))
    # What would begin a list, a heading or a rule.
    text = re.sub(r"^(\d*)([-+#=](?=[-+#= ]|$)|(?<=\d)[.)](?= |$))", r"\1\\\2", text)
    return re.sub(r"&(?=[#A-Za-z])|[<>|]|:(?=//)|(?<=www)\.", _entity, text)


def _entity(match: re.Match[str]) -> str:
    return {"<": "&lt;", ">": "&gt;", "&": "&amp;"}.get(match[0], f"&#{ord(match[0])};")
