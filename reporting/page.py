"""What the report says: sentences, tables and pictures, in the order in which they are read.

`contents` gives them as plain values; templates/ has the two forms, HTML and Markdown.
"""

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from reporting import figures, paper
from reporting.paired import Comparison, Difference, compare_with_plain, nearest
from reporting.runs import ATTENTION, Group, Left, as_text, short

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
# Comparisons that get a card at the head of the page; of more, the first card counts them.
CARDS = 3
KINDS = {
    "diverged": "diverged: the loss stopped being finite",
    "unfinished": "unfinished",
    "other data": "of another data set",
    "repeated": "there twice",
    "unreadable": "not readable",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``texts`` columns are words, the others numbers."""

    head: list[str]
    rows: list[list[str]]
    texts: int = 1

    @property
    def long(self) -> bool:
        """Whether it would push what follows out of sight."""
        return len(self.rows) > 16


@dataclass(frozen=True)
class Picture:
    """An SVG, the name of its file beside report.md, and what it shows in words."""

    name: str
    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Card:
    """A comparison's outcome, for the head of the page."""

    title: str
    number: str
    unit: str
    verdict: str
    tone: str  # better, worse or open
    details: list[str]


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; ``folded`` is shown on demand."""

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folded: tuple[str, Table] | None = None


def contents(data: str, groups: list[Group], left: list[Left]) -> dict[str, Any]:
    """Everything that the templates show of the groups, which are all of one data set."""
    comparisons = compare_with_plain(groups)
    first = nearest(comparisons)
    sections = [
        scores_section(data, groups),
        differences_section(comparisons),
        curves_section(groups, first),
        cost_section(groups),
        sweep_section(groups),
        classes_section(first),
        paper_section(data, groups),
        provenance_section(groups),
        left_section(left),
    ]
    return {
        "title": "Does attention help?",
        "lead": lead(data, groups, left),
        "cards": cards(first),
        "forest": _forest(first),
        "warnings": warnings(groups, first),
        "sections": [one for one in sections if one is not None],
    }


def _forest(comparisons: list[Comparison]) -> Picture | None:
    drawn = [one for one in _attention_first(comparisons) if one.top1.n]
    if not drawn:
        return None
    caption = (
        "Top-1 of the last epoch minus that of the plain network with the same seed: each pair "
        "(circle), their mean (diamond), its 95 % interval (bar; none for one pair)."
    )
    if len(drawn) > figures.ROWS:
        caption += f" Of {len(drawn)} the {figures.ROWS // 2} highest and the lowest."
        drawn.sort(key=lambda one: -(one.top1.mean or 0.0))
        drawn = drawn[: figures.ROWS // 2] + drawn[-figures.ROWS // 2 :]
    svg = figures.differences(drawn)
    return Picture("differences", "Differences to the plain twin", svg, caption)


def _attention_first(comparisons: list[Comparison]) -> list[Comparison]:
    return sorted(comparisons, key=lambda one: one.group.attention != "aa")


def lead(data: str, groups: list[Group], left: list[Left]) -> str:
    """What was compared, in a sentence."""
    models = " and ".join(dict.fromkeys(one.model for one in groups))
    epochs = " and ".join(dict.fromkeys(as_text(one.settings["epochs"]) for one in groups))
    name, on = data.split(" ", 1)
    name = name.replace("cifar", "CIFAR-")
    runs = count(sum(len(one.runs) for one in groups), "finished run")
    more = f"; {count(len(left), 'folder')} not counted, listed at the end" if left else ""
    return (
        f"{runs} of {count(len(groups), 'network')} on {name} ({on} images): {models}, {epochs} "
        f"epochs. Scores are the last epoch's, never the best one's{more}."
    )


# ---- The answer ---------------------------------------------------------------------------------


def cards(comparisons: list[Comparison]) -> list[Card]:
    """The outcomes that the page begins with, attention's first."""
    augmented = [one for one in comparisons if one.group.attention == "aa"]
    others = [one for one in comparisons if one.group.attention != "aa"]
    if not comparisons:
        return [
            Card(
                "No comparison",
                DASH,
                "",
                "There is no finished network together with its plain twin.",
                "open",
                ["The twin has the same network and data and attention=none."],
            )
        ]
    if len(augmented) > CARDS:
        return [_counted(augmented), *map(_card, others[: CARDS - 1])]
    return [_card(one) for one in _attention_first(comparisons)[:CARDS]]


def _card(one: Comparison) -> Card:
    found, label = one.top1, one.group.label
    details = [
        f"95 % interval {interval(found)}" if found.low is not None else "no interval",
        f"n = {count(found.n, 'pair')} of seeds"
        + (f", p {p_value(found.p)}" if found.p is not None else ""),
    ]
    if found.n:
        top1 = [statistics.mean(g.scores("top1").values()) for g in (one.group, one.twin)]
        details.append(f"{top1[0]:.2f} % against {top1[1]:.2f} %")
    if one.differing:
        details.append(f"the recipes differ: {', '.join(map(short, one.differing))}")
    tone = {1: "better", -1: "worse", 0: "open"}[found.sign]
    return Card(
        f"{label} against {one.twin.label}",
        DASH if found.mean is None else signed(found.mean),
        "percentage points of top-1",
        verdict(found, label),
        tone,
        details,
    )


def verdict(found: Difference, label: str) -> str:
    """What the paired differences allow to say."""
    if found.n == 0:
        return "No seed in common: no paired difference."
    if found.n == 1:
        return "One pair of seeds: how much of this is chance cannot be said."
    if found.low is None:
        return "All pairs differ by the same: there is no spread to test against."
    if found.sign:
        return f"{label} is {'better' if found.sign > 0 else 'worse'} than plain."
    return "These runs do not tell the two apart."


def _counted(comparisons: list[Comparison]) -> Card:
    signs = [one.top1.sign for one in comparisons]
    tested = [one for one in comparisons if one.top1.low is not None]
    means = [one.top1.mean for one in comparisons if one.top1.mean is not None]
    spread = f"from {signed(min(means))} to {signed(max(means))}" if means else DASH
    return Card(
        f"{len(comparisons)} augmented networks, each against its plain twin",
        f"{signs.count(1)} better, {signs.count(-1)} worse",
        f"{signs.count(0)} not told apart",
        f"Mean differences in top-1 range {spread} percentage points.",
        "open",
        [
            f"{len(tested)} of them have the two pairs of seeds that an interval needs",
            f"95 % intervals, one by one: about {0.05 * len(tested):.1f} of {len(tested)} would "
            "exclude zero by chance alone",
        ],
    )


def warnings(groups: list[Group], comparisons: list[Comparison]) -> list[str]:
    """What a reader must know before believing the differences."""
    found = []
    for one in comparisons:
        if one.differing and len(comparisons) <= figures.ROWS:
            found.append(
                f"{one.group.label} and {one.twin.label} are not trained alike: "
                + "; ".join(f"{k} {as_text(a)} / {as_text(b)}" for k, (a, b) in differing(one))
                + "."
            )
    for fact, words in (
        ("commit", "commits"),
        ("hardware", "kinds of hardware"),
        ("precision", "precisions"),
        ("torch", "versions of torch"),
    ):
        mixed = [one.label for one in groups if len(one.seen(fact)) > 1]
        if mixed:
            names = ", ".join(mixed[:5]) + (", ..." if len(mixed) > 5 else "")
            found.append(f"Several {words} within {names}: see Where the numbers come from.")
        elif len({value for one in groups for value in one.seen(fact)}) > 1:
            found.append(f"The networks are of several {words}: see Where the numbers come from.")
    return found


def differing(one: Comparison) -> list[tuple[str, tuple[Any, Any]]]:
    return list(one.differing.items())


# ---- The sections -------------------------------------------------------------------------------


def scores_section(data: str, groups: list[Group]) -> Section:
    """Table 1, beside the paper's where it has these networks."""
    in_paper = any(_printed(data, one) for one in groups)
    seeds = sorted({run.seed for one in groups for run in one.runs})
    alike = all([run.seed for run in one.runs] == seeds for one in groups)
    head = ["network", "n", "parameters", "GFLOPs", "top-1 %", "top-5 %", "top-1 by seed"]
    rows = []
    for one in groups:
        row = [
            one.label,
            str(len(one.runs)),
            f"{one.first['parameters']:,}",
            gflops(one.first["flops"]),
            spread(one.scores("top1")),
            spread(one.scores("top5")),
            by_seed(one.scores("top1"), alike),
        ]
        if in_paper:
            printed = _printed(data, one)
            row += (
                [DASH] * 4
                if printed is None
                else [
                    f"{printed.parameters} M",
                    str(printed.gflops),
                    str(printed.top1),
                    str(printed.top5),
                ]
            )
        rows.append(row)
    if in_paper:
        head += ["paper: params", "GFLOPs", "top-1 %", "top-5 %"]
    return Section(
        "Scores",
        ["Mean ± standard deviation over n seeds; one run has no deviation."],
        [Table(head, rows)],
        notes=[f"Seeds, in this order: {', '.join(map(str, seeds))}."] if alike else [],
    )


def _printed(data: str, one: Group) -> paper.Row | None:
    if data != paper.DATA or one.model != paper.MODEL:
        return None
    return paper.TABLE1.get(one.attention)


def differences_section(comparisons: list[Comparison]) -> Section | None:
    """The paired differences and the test behind the intervals."""
    if not comparisons:
        return None
    head = ["network", "settings that differ", "n", "top-1", "95 % interval", "t (df)", "p"]
    head += ["top-1 of each pair", "top-5 (interval)"]
    rows = []
    for one in comparisons:
        found, top5 = one.top1, one.top5
        differ = "; ".join(f"{k} {as_text(a)} / {as_text(b)}" for k, (a, b) in differing(one))
        rows.append(
            [
                f"{one.group.label} {MINUS} {one.twin.label}",
                differ or "none but attention",
                str(found.n),
                DASH if found.mean is None else signed(found.mean),
                interval(found),
                DASH if found.t is None else f"{signed(found.t)} ({found.n - 1})",
                p_value(found.p).removeprefix("= "),
                ", ".join(f"{seed}: {signed(d)}" for seed, d in found.by_seed.items()) or DASH,
                DASH if top5.mean is None else f"{signed(top5.mean)} ({interval(top5)})",
            ]
        )
    return Section(
        "Differences to the plain twin",
        [
            "In percentage points. Runs of the same seed make a pair. The interval and p are those "
            "of the two-sided paired t-test, which takes the differences to be normal; of one pair "
            "there is neither. None is corrected for the number of comparisons."
        ],
        [Table(head, rows, texts=2)],
    )


def curves_section(groups: list[Group], comparisons: list[Comparison]) -> Section:
    """Loss, accuracy and its difference to the plain twin's over the epochs."""
    band = "Mean of the seeds; the band reaches from the least to the most of them."
    lead = []
    if any(figures.same_length(one) for one in comparisons):
        lead.append(
            Picture(
                "lead",
                "Lead over plain",
                figures.lead_over_epochs(groups, comparisons),
                "Top-1 minus that of the plain twin with the same seed, after each epoch.",
            )
        )
    return Section(
        "Learning curves",
        [band],
        pictures=[
            Picture(
                "top1",
                "Accuracy",
                figures.over_epochs(groups, "top1", "top-1 accuracy (%)"),
                "Top-1 accuracy after each epoch.",
            ),
            *lead,
            Picture(
                "loss",
                "Training loss",
                figures.over_epochs(groups, "train_loss", "training loss (nats)"),
                "Mean training loss of each epoch.",
            ),
        ],
    )


def cost_section(groups: list[Group]) -> Section:
    """Accuracy for the price of it."""
    hardware = sorted({value for one in groups for value in one.seen("hardware")})
    where = f"Measured on {', '.join(hardware)}."
    if len(hardware) > 1:
        where += " Times on different hardware do not compare."
    rows = [
        [
            one.label,
            str(len(one.runs)),
            minutes(one),
            gflops(one.first["flops"]),
            spread(one.scores("top1")),
        ]
        for one in groups
    ]
    return Section(
        "What it costs",
        [where],
        [Table(["network", "n", "minutes of training", "GFLOPs", "top-1 %"], rows)],
        [
            Picture(
                "time",
                "Accuracy against time",
                figures.over_time(groups, "top1", "top-1 accuracy (%)"),
                "Top-1 over the time that training and evaluation took, mean of the seeds.",
            ),
            Picture(
                "flops",
                "Accuracy against FLOPs",
                figures.over_flops(groups),
                "Top-1 against the forward pass of one image, two FLOPs per multiply-add: each "
                "seed (dot), mean and standard deviation.",
            ),
        ],
    )


def sweep_section(groups: list[Group]) -> Section | None:
    """Heatmaps over dk and dv, one for each Nh, for all that is otherwise trained alike."""
    axes = ("attention.dk", "attention.dv", "attention.Nh")
    alike: dict[str, list[Group]] = defaultdict(list)
    for one in groups:
        if one.attention == "aa" and all(axis in one.settings for axis in axes):
            rest = {k: v for k, v in one.settings.items() if k not in axes}
            alike[f"{one.model} {sorted(rest.items(), key=str)}"].append(one)
    sweeps = [members for members in alike.values() if len(members) > 1]
    pictures = []
    for number, members in enumerate(sweeps):
        table: dict[Any, dict[tuple[float, float], tuple[float, int]]] = defaultdict(dict)
        for one in members:
            dk, dv, heads = (one.settings[axis] for axis in axes)
            values = one.scores("top1").values()
            table[heads][dk, dv] = (statistics.mean(values), len(values))
        means = [mean for cells in table.values() for mean, _ in cells.values()]
        for heads, cells in sorted(table.items()):
            title = f"{members[0].model}, Nh = {heads}"
            pictures.append(
                Picture(
                    f"sweep{number + 1}-Nh{heads}",
                    title,
                    figures.heatmap(cells, min(means), max(means), title),
                    f"{title}: mean top-1 (%) of the last epoch over n seeds.",
                )
            )
    if not pictures:
        return None
    text = "dk and dv are channels, or below 1 fractions of the block's output; all panels of a "
    text += "network have one scale of colours."
    return Section("The attention's size", [text], pictures=pictures)


def classes_section(comparisons: list[Comparison]) -> Section | None:
    """Which classes gain and lose, for the first augmented network that has a twin."""
    for one in comparisons:
        names = one.group.first.get("class_names")
        rows = _by_class(one, names) if one.group.attention == "aa" and names else []
        if rows:
            break
    else:
        return None
    n = one.top1.n
    unit = "AA minus plain, top-1 (percentage points)"
    cut = len(rows) > 2 * figures.CLASSES
    what = f"the {figures.CLASSES} classes at either end" if cut else "all classes"
    table = [
        [name, signed(mean), ", ".join(map(signed, pairs))] for name, mean, pairs in reversed(rows)
    ]
    return Section(
        "Class by class",
        [
            f"{one.group.label} minus {one.twin.label}, n = {count(n, 'pair')} of seeds. A class "
            "has few test images: of many classes some differ much by chance alone."
        ],
        pictures=[
            Picture(
                "classes",
                "Differences by class",
                figures.classes(rows, unit),
                f"Mean difference of {what}" + ("; dots are the pairs." if n > 1 else "."),
            )
        ],
        folded=(
            f"all {len(rows)} classes",
            Table(["class", "AA minus plain, points", "of each pair"], table),
        ),
    )


def _by_class(one: Comparison, names: list[str]) -> list[tuple[str, float, list[float]]]:
    ours = {run.seed: run.summary.get("per_class_top1") for run in one.group.runs}
    theirs = {run.seed: run.summary.get("per_class_top1") for run in one.twin.runs}
    rows = []
    for number, name in enumerate(names):
        pairs = []
        for seed in one.top1.by_seed:
            a, b = ours[seed], theirs[seed]
            if a and b and a[number] is not None and b[number] is not None:
                pairs.append(a[number] - b[number])
        if pairs:
            rows.append((name, statistics.mean(pairs), pairs))
    return sorted(rows, key=lambda row: (row[1], row[0]))


def paper_section(data: str, groups: list[Group]) -> Section:
    """By how much the paper's scores and ours differ, and in what the recipe does."""
    gain = paper.TABLE1["aa"].top1 - paper.TABLE1["plain"].top1
    matched = [(one, row) for one in groups if (row := _printed(data, one)) is not None]
    text = [
        f"The paper (Bello et al., ICCV 2019, Table 1: {paper.NETWORK} on CIFAR-100) prints single "
        f"numbers without n or spread; by them, attention gains {signed(gain, 1)} points of top-1."
    ]
    tables = []
    if matched:
        rows = []
        for one, row in matched:
            top1 = statistics.mean(one.scores("top1").values())
            top5 = statistics.mean(one.scores("top5").values())
            millions = one.first["parameters"] / 1e6
            cost = one.first["flops"] / 1e9
            rows.append(
                [
                    one.label,
                    str(len(one.runs)),
                    f"{top1:.2f} / {row.top1} ({signed(top1 - row.top1)})",
                    f"{top5:.2f} / {row.top5} ({signed(top5 - row.top5)})",
                    f"{millions:.2f} / {row.parameters} ({signed(millions - row.parameters)})",
                    f"{cost:.2f} / {row.gflops} ({signed(cost - row.gflops)})",
                ]
            )
        head = ["ours / paper (difference)", "n", "top-1 %", "top-5 %", "parameters, M", "GFLOPs"]
        tables.append(Table(head, rows))
    else:
        text.append(
            f"None of these runs is a {paper.NETWORK} on CIFAR-100's test images, so there is "
            "nothing here to hold against its scores, which are:"
        )
        printed = [
            [row.name, f"{row.parameters} M", str(row.gflops), str(row.top1), str(row.top5)]
            for row in paper.TABLE1.values()
        ]
        head = ["the paper's network", "parameters", "GFLOPs", "top-1 %", "top-5 %"]
        tables.append(Table(head, printed))
    shown = [one for one, _ in matched] or _one_of_each(groups)
    recipe = _recipe(shown)
    notes = list(paper.NOTES) if any(one.attention == "aa" for one, _ in matched) else []
    if recipe.rows:
        tables.append(recipe)
    else:
        notes.append("The recipe is the paper's, as far as that is known.")
    return Section("Beside the paper", text, tables, notes=notes)


def _one_of_each(groups: list[Group]) -> list[Group]:
    first: dict[str, Group] = {}
    for one in groups:
        first.setdefault(one.attention, one)
    return list(first.values())


def _recipe(groups: list[Group]) -> Table:
    """What the paper does otherwise, one row for each group and setting that differ."""
    differ: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for one in groups:
        settings = {"model.name": one.model} | one.settings
        for setting in paper.RECIPE:
            printed, ours = setting.of(one.attention), settings.get(setting.key, DASH)
            if printed is not None and printed != ours:
                values = (_last(as_text(printed)), _last(as_text(ours)))
                key = (_last(setting.key), *values, paper.SURE[setting.sure])
                differ[key].append(one.label)
    rows = [
        [name, ", ".join(labels), printed, ours, sure]
        for (name, printed, ours, sure), labels in differ.items()
    ]
    rows.sort(key=lambda row: [_last(s.key) for s in paper.RECIPE].index(row[0]))
    return Table(["what differs", "in", "paper", "here", "the paper's value is"], rows, texts=5)


def _last(name: str) -> str:
    """`optim._target_` is the optimiser; `torch.optim.SGD` is SGD; numbers stay."""
    if name.endswith("._target_"):
        return {"optim": "optimiser", "schedule": "schedule"}[name.partition(".")[0]]
    return name.rpartition(".")[2] if name.startswith(("torch.", "training.")) else name


def provenance_section(groups: list[Group]) -> Section:
    """Where each group's runs come from, and the settings behind the labels."""
    rows = []
    for one in groups:
        facts = [one.seen(fact) for fact in ("commit", "hardware", "precision", "torch")]
        facts[0] = [commit(value) for value in facts[0]]
        mixed = [("mixed: " if len(values) > 1 else "") + ", ".join(values) for values in facts]
        rows.append([one.label, ", ".join(str(run.seed) for run in one.runs), *mixed])
    keys = sorted({key for one in groups for key in one.settings})
    common = [
        [key, as_text(groups[0].settings.get(key))]
        for key in keys
        if len({as_text(one.settings.get(key)) for one in groups}) == 1
    ]
    head = ["network", "seeds", "commit", "hardware", "precision", "torch"]
    return Section(
        "Where the numbers come from",
        [f"From the summary.json and metrics.csv of {count(len(groups), 'network')}."],
        [Table(head, rows, texts=6)],
        folded=("settings that all of them share", Table(["setting", "value"], common, texts=2)),
    )


def left_section(left: list[Left]) -> Section | None:
    """What was found and is in no number above."""
    if not left:
        return None
    order = list(KINDS)
    rows = [
        [KINDS[one.kind], one.why, str(one.folder)]
        for one in sorted(left, key=lambda one: (order.index(one.kind), str(one.folder)))
    ]
    counts = ", ".join(
        f"{sum(one.kind == kind for one in left)} {words.partition(':')[0]}"
        for kind, words in KINDS.items()
        if any(one.kind == kind for one in left)
    )
    return Section(
        "Not counted",
        [f"These folders are in no number above: {counts}."],
        [Table(["what", "why", "folder"], rows, texts=3)],
    )


# ---- Words for numbers --------------------------------------------------------------------------


def signed(value: float, digits: int = 2) -> str:
    """With its sign, a real minus; zero has none."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"+{text}" if value > 0 else f"{MINUS}{text}"


def interval(found: Difference) -> str:
    if found.low is None or found.high is None:
        return DASH
    return f"{signed(found.low)} to {signed(found.high)}"


def p_value(p: float | None) -> str:
    if p is None:
        return DASH
    return "< 0.001" if p < 0.001 else f"= {p:.2g}"


def spread(scores: dict[int, float]) -> str:
    values = list(scores.values())
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ± {statistics.stdev(values):.2f}"


def by_seed(scores: dict[int, float], same_seeds: bool) -> str:
    """The raw values; with their seeds, where not all groups have the same."""
    if same_seeds:
        return ", ".join(f"{value:.2f}" for value in scores.values())
    return ", ".join(f"{seed}: {value:.2f}" for seed, value in scores.items())


def gflops(flops: float) -> str:
    return f"{flops / 1e9:.3g}"


def minutes(one: Group) -> str:
    return spread({run.seed: run.summary["seconds"] / 60 for run in one.runs})


def commit(name: str) -> str:
    """Its first ten digits, and whether the tree was clean."""
    digits, _, state = name.partition("-")
    return f"{digits[:10]}{'-' if state else ''}{state}"


def count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


assert set(ATTENTION) == set(paper.TABLE1)
