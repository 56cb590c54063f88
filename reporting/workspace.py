"""A wandb workspace that shows from a project's runs whether attention helps.

It needs the package ``wandb-workspaces``. Each key in it is logged by a training run, a sweep run
or the compare run; a panel stays empty if no run of the project has its key.
"""

from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as ws

from training.tracking import CHARTS, chart_table

NAME = "Does attention help?"
# What runs may be scored on; a sweep should use held-out images.
IMAGES = {"val": "on held-out images", "test": "on the test set"}
# Colors from the worst run of a sweep to the best.
GRADIENT = [
    panels.GradientPoint(color="#b9c6d3", offset=0),
    panels.GradientPoint(color="#1f6f8b", offset=60),
    panels.GradientPoint(color="#d1495b", offset=100),
]


class _Column(panels.ParallelCoordinatesPlotColumn):
    """A setting by its flat dotted key; the package would look it up in nested settings."""

    def _to_model(self) -> Any:
        model = super()._to_model()
        assert isinstance(self.metric, panels.Config)
        model.accessor = f"config:{self.metric.name}.value"
        return model


class _Scatter(panels.ScatterPlot):
    """A scatter plot over a setting or network property by its flat dotted key, as above."""

    def _to_model(self) -> Any:
        model = super()._to_model()
        assert isinstance(self.x, panels.Config)
        model.config.x_axis = f"config:{self.x.name}.value"
        return model


def build(
    project: str, entity: str, blocks: Sequence[str], data: str | None = None
) -> ws.Workspace:
    """Build the workspace without saving it.

    It shows the attention of the augmented ``blocks`` (module names), and the runs on ``data``, by
    default all runs.
    """
    of_data = ws.And(ws.Config("data") == data) if data is not None else ""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME if data is None else f"{NAME} ({data})",
        sections=[
            _section("The comparison", _comparison(), pinned=True, columns=2, rows=2),
            _section("Learning curves", _curves(), columns=3, rows=3),
            _section("Sweeps of dk, dv and Nh", _sweep(), columns=2, rows=3),
            _section("Accuracy and cost", _cost(), columns=2, rows=2),
            _section("What the networks see", _seen(blocks), columns=3, rows=2),
            _section("Settings", [panels.RunComparer(diff_only="split")], columns=1, rows=1),
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=of_data,
            pinned_columns=["config:variant.value", "summary:test/top1", "summary:val/top1"],
        ),
    )


def as_json(workspace: ws.Workspace) -> str:
    """The JSON that `save` sends, indented."""
    spec = workspace._to_model().spec
    return str(spec.model_dump_json(by_alias=True, exclude_none=True, indent=2))


def save(workspace: ws.Workspace, url: str | None = None) -> str:
    """Save the workspace as a new view, or replace the one at ``url``; return its URL.

    Raises:
        ValueError: if ``url`` is not a workspace of the project.
        Exception: various wandb errors, such as no account, no such project, or no network.
    """
    if url is not None:
        before = ws.Workspace.from_url(url)
        if (before.entity, before.project) != (workspace.entity, workspace.project):
            raise ValueError(
                f"{url} belongs to {before.entity}/{before.project}, not to "
                f"{workspace.entity}/{workspace.project}"
            )
        workspace._internal_name, workspace._internal_id = (
            before._internal_name,
            before._internal_id,
        )
    return str(workspace.save().url)


# ---- Sections -----------------------------------------------------------------------------------


def _section(
    name: str, content: list[Any], *, columns: int, rows: int, pinned: bool = False
) -> ws.Section:
    return ws.Section(
        name=name,
        panels=content,
        is_open=True,
        pinned=pinned,
        layout_settings=ws.SectionLayoutSettings(columns=columns, rows=rows),
    )


def _comparison() -> list[Any]:
    return [
        panels.MediaBrowser(
            title="Difference from the plain network, paired by seed",
            media_keys=["compare/differences"],
        ),
        panels.MediaBrowser(title="Mean over the seeds", media_keys=["compare/curves"]),
        panels.WeavePanelSummaryTable(table_name="compare/table"),
        panels.WeavePanelSummaryTable(table_name="compare/settings"),
    ]


def _curves() -> list[Any]:
    """Each variant's mean over the seeds, with a band from the lowest to the highest."""
    titles = {
        "test/top1": "Top-1 on the test set (%)",
        "val/top1": "Top-1 on held-out images (%)",
        "train/top1": "Top-1 in training (%)",
        "best/val_top1": "Best top-1 on held-out images so far (%)",
        "train/loss": "Loss in training",
        "test/loss": "Loss on the test set",
        "train/grad_norm": "Norm of the gradient",
        "attention/entropy": "Entropy of attention (1 is uniform, 0 looks at one place)",
        "attention/lowest_entropy": "Entropy of the sharpest layer's attention",
    }
    return [
        panels.LinePlot(
            title=title,
            x="epoch",
            y=[name],
            title_x="epoch",
            groupby=panels.Config("variant"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=100,
            log_y=name == "train/grad_norm",
        )
        for name, title in titles.items()
    ]


def _sweep() -> list[Any]:
    settings = ("attention.dk", "attention.dv", "attention.Nh", "optim.lr")
    columns = [
        _Column(
            metric=panels.Config(name),
            display_name=name.rpartition(".")[2],
            log=name == "optim.lr",
        )
        for name in settings
    ]
    shown: list[Any] = [
        panels.WeavePanelSummaryTable(table_name="compare/best"),
        panels.MediaBrowser(title="Top-1 by setting", media_keys=["compare/heatmaps"]),
    ]
    for on, where in IMAGES.items():
        score = panels.ParallelCoordinatesPlotColumn(
            metric=panels.SummaryMetric(f"{on}/top1"), display_name=f"{on} top-1 (%)"
        )
        shown += [
            panels.ParallelCoordinatesPlot(
                title=f"Settings and top-1 {where}", columns=[*columns, score], gradient=GRADIENT
            ),
            panels.ParameterImportancePlot(with_respect_to=f"{on}/top1"),
        ]
    return shown


def _cost() -> list[Any]:
    costs = {"network.flops": "FLOPs per image", "network.parameters": "parameters"}
    return [
        _Scatter(
            title=f"Top-1 {where} (%) by {words}",
            x=panels.Config(cost),
            y=panels.SummaryMetric(f"{on}/top1"),
            legend_template="${config:variant}",
        )
        for on, where in IMAGES.items()
        for cost, words in costs.items()
    ]


def _seen(blocks: Sequence[str]) -> list[Any]:
    """Attention maps over the epochs, and the predictions of the trained networks."""
    attention = [
        panels.MediaBrowser(
            title=f"Attention of {name}",
            media_keys=[f"media/attention/{name}"],
            gallery_axis="step",
        )
        for name in blocks
    ]
    charts = []
    for name, (preset, fields, title) in CHARTS.items():
        chart = panels.CustomChart.from_table(chart_table(name), fields, {"title": title})
        chart.chart_name = preset
        charts.append(chart)
    tables = [
        panels.WeavePanelSummaryTable(table_name=name)
        for name in ("media/predictions", "media/confusion")
    ]
    return [*attention, *charts, *tables]
