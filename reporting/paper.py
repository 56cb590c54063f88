"""The paper's results on CIFAR-100 (Bello et al., ICCV 2019, Table 1), next to these runs.

Each value states how reliable its source is. The paper prints single numbers, without the number of
runs or a spread.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from reporting import text
from reporting.analysis import Analysis
from reporting.parts import Section, tables
from reporting.runs import NOT_SET, Variant, grouped
from reporting.text import DASH, short_name, signed

NETWORK = "Wide-ResNet-28-10"
MODEL, DATA = "wrn28_10", "cifar100 test"

SURE = {
    "table": "checked against the paper's own table or sentence",
    "second": "from one secondary source",
    "memory": "from memory, not checked",
}


@dataclass(frozen=True)
class Row:
    """A row of Table 1: millions of parameters, GFLOPs per image, accuracies in percent."""

    name: str
    parameters: float
    gflops: float
    top1: float
    top5: float


# All values are from the source SURE["table"].
TABLE1 = {
    "none": Row("Wide-ResNet-28-10", 36.3, 10.4, 80.3, 95.0),
    "ge": Row("GE-Wide-ResNet (no parameters)", 36.3, 10.4, 79.8, 95.0),
    "se": Row("SE-Wide-ResNet", 36.5, 10.4, 81.0, 95.3),
    "aa": Row("AA-Wide-ResNet", 36.2, 10.9, 81.6, 95.2),
}


@dataclass(frozen=True)
class Recipe:
    """A setting of the paper: its values without and with attention, and its source in SURE."""

    key: str
    plain: object
    augmented: object
    sure: str

    def of(self, attention: str) -> object:
        return self.augmented if attention == "aa" else self.plain


RECIPE = (
    Recipe("model.name", MODEL, MODEL, "table"),
    Recipe("epochs", 500, 500, "second"),
    Recipe("batch_size", 1024, 256, "memory"),
    Recipe("optim.lr", 0.8, 0.2, "second"),  # 0.2 * batch / 256
    Recipe("optim.weight_decay", 2e-4, 5e-4, "memory"),
    Recipe("optim._target_", "torch.optim.SGD", "torch.optim.SGD", "second"),
    Recipe("optim.momentum", 0.9, 0.9, "second"),
    Recipe("schedule._target_", *2 * ("training.schedule.warmup_cosine",), "second"),
    Recipe("schedule.warmup", 0.05, 0.05, "second"),
    Recipe("augmentation.crop_pad", 4, 4, "memory"),
    Recipe("augmentation.flip", True, True, "memory"),
    Recipe("attention.dk", None, 0.2, "table"),
    Recipe("attention.dv", None, 0.1, "table"),
    Recipe("attention.Nh", None, 8, "table"),
    Recipe("attention.min_dkh", None, 20, "table"),
    Recipe("attention.position", None, "relative", "table"),
    Recipe("attention.stages", None, [1, 2, 3], "table"),
    Recipe("attention.blocks", None, "all", "table"),
    Recipe("attention.init", None, "glorot", "second"),
    Recipe("attention.qk_norm", None, False, "second"),
)
NOTES = (
    "GFLOPs: ours count every multiply-add of the forward pass, attention's too, and come to 12.3 "
    "for the augmented network, where the paper prints 10.9.",
    "Parameters: ours share the position tables among the heads (36.05 M); a table per head "
    "would give 36.18 M, which is nearer to the paper's 36.2 M.",
)


def printed(data: str, variant: Variant) -> Row | None:
    """The paper's row for the variant's network, or None."""
    same = data == DATA and variant.model == MODEL
    return TABLE1.get(variant.attention) if same else None


def cells(row: Row | None) -> dict[str, str]:
    """The table cells of the paper's row; dashes if there is no row."""
    numbers = [DASH] * 4
    if row is not None:
        numbers = [f"{row.parameters} M", str(row.gflops), str(row.top1), str(row.top5)]
    return dict(zip(("parameters", "GFLOPs", "top-1 %", "top-5 %"), numbers, strict=True))


def paper_section(analysis: Analysis) -> Section:
    """How our scores and recipe differ from the paper's."""
    gain = TABLE1["aa"].top1 - TABLE1["none"].top1
    words = [
        f"The paper (Bello et al., ICCV 2019, Table 1: {NETWORK} on CIFAR-100) prints single "
        "numbers, without the number of runs or a spread. By these numbers, attention changes "
        f"top-1 by {signed(gain, 1)} points."
    ]
    rows = {variant: printed(analysis.data, variant) for variant in analysis.variants}
    matched = {variant: row for variant, row in rows.items() if row is not None}
    notes: list[str] = []
    if matched:
        made = tables(_beside(matched))
        if any(variant.attention == "aa" for variant in matched):
            notes += NOTES
    else:
        words.append(
            f"None of these runs is a {NETWORK} evaluated on CIFAR-100's test set, so they "
            "are not comparable with its scores, which are:"
        )
        made = tables([{"the paper's network": r.name, **cells(r)} for r in TABLE1.values()])
    one_of_each = [same[0] for same in grouped(analysis.variants, lambda v: v.attention).values()]
    recipe = _recipe(matched or one_of_each)
    made += tables(recipe, texts=5, caption="Settings that differ from the paper's.")
    if not recipe:
        notes.append("The recipe is the paper's, as far as that is known.")
    return Section("Comparison with the paper", words, made, notes=notes)


def _beside(matched: dict[Variant, Row]) -> list[dict[str, str]]:
    return [
        {
            "ours / paper (difference)": variant.label,
            "n": str(len(variant.runs)),
            "top-1 %": text.against(variant.mean("top1"), row.top1),
            "top-5 %": text.against(variant.mean("top5"), row.top5),
            "parameters, M": text.against(variant.first["parameters"] / 1e6, row.parameters),
            "GFLOPs": text.against(variant.first["flops"] / 1e9, row.gflops),
        }
        for variant, row in matched.items()
    ]


def _recipe(variants: Iterable[Variant]) -> list[dict[str, str]]:
    """One row for each setting that differs from the paper's and each pair of values."""
    labels: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for setting in RECIPE:
        for variant in variants:
            theirs = setting.of(variant.attention)
            ours = ({"model.name": variant.model} | variant.settings).get(setting.key, NOT_SET)
            if theirs is not None and theirs != ours:
                values = [short_name(text.as_text(value)) for value in (theirs, ours)]
                key = (setting.key, *values, SURE[setting.sure])
                labels[key].append(variant.label)
    return [
        {
            "setting": short_name(key),
            "variants": ", ".join(of_these),
            "paper": theirs,
            "here": ours,
            "source of the paper's value": source,
        }
        for (key, theirs, ours, source), of_these in labels.items()
    ]
