"""From our panels to Grafana's JSON, through the types of Grafana's own SDK.

Written for Grafana 11.6; newer ones read it too. The JSON is made whole and in one order, so
the same program always writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.dashboards.panels import Board, Kind, Panel, Query, Row, placed
from deploy.dashboards.queries import PRICE, VARIABLES, Amount, Variable

TAG = "elastiformer"
SOURCE = dashboard.DataSourceRef(type_val="prometheus", uid="${datasource}")
_CALM, _ALARM = "green", "red"
_Drawn = stat.Panel | timeseries.Panel | heatmap.Panel | table.Panel


def as_json(board: Board, others: Sequence[Board]) -> str:
    """The file that Grafana provisions, with links to the other dashboards."""
    built = (
        builders.Dashboard(board.title)
        .uid(f"elastiformer-{board.name}")
        .description(board.question)
        .tags([TAG])
        .editable()
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
    )
    source = builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    built.with_variable(source)
    for variable in VARIABLES:
        built.with_variable(_choice(variable))
    exprs = (query.expr for row in board.rows for panel in row.panels for query in panel.queries)
    if any(f"${PRICE.name}" in expr for expr in exprs):
        built.with_variable(_written(PRICE))
    for other in others:
        built.link(
            builders.DashboardLink(other.title)
            .type(dashboard.DashboardLinkType.LINK)
            .url(f"/d/elastiformer-{other.name}")
            .keep_time(True)
            .include_vars(True)
        )
    shut: builders.Row | None = None  # the last one, with its panels inside of it
    for number, (thing, place) in enumerate(placed(board), start=1):
        position = dashboard.GridPos(h=place.height, w=place.width, x=place.x, y=place.y)
        if isinstance(thing, Row):
            row = builders.Row(thing.title).id(number).grid_pos(position)
            if thing.may_lack:
                shut = row
            else:
                built.with_row(row)
        elif shut is not None:
            shut.with_panel(_panel(thing).id(number).grid_pos(position))
        else:
            built.with_panel(_panel(thing).id(number).grid_pos(position))
    if shut is not None:
        built.with_row(shut)
    return json.dumps(built.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _choice(variable: Variable) -> builders.QueryVariable:
    """Everything at first; Grafana writes all the values out, so `up` is asked for ours alone."""
    return (
        builders.QueryVariable(variable.name)
        .label(variable.title)
        .datasource(SOURCE)
        .query(
            {
                "qryType": 1,  # Grafana's number for the values of a label
                "query": f"label_values({variable.among}, {variable.label})",
                "refId": f"{variable.name}-values",
            }
        )
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(dashboard.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _written(amount: Amount) -> builders.TextBoxVariable:
    value = dashboard.VariableOption(selected=True, text=amount.default, value=amount.default)
    return (
        builders.TextBoxVariable(amount.name)
        .label(amount.title)
        .description(amount.question)
        .default_value(amount.default)
        .current(value)
        .options([value])
    )


def _panel(panel: Panel) -> _Drawn:
    match panel.kind:
        case Kind.STAT:
            drawn: _Drawn = _stat()
        case Kind.HEATMAP:
            drawn = _heatmap(panel)
        case Kind.TABLE:
            drawn = _table()
        case Kind.LINES | Kind.AREAS:
            drawn = _lines(panel)
    drawn.title(panel.title).description(panel.question).datasource(SOURCE)
    drawn.thresholds(_thresholds(panel.alarm))
    if panel.kind is not Kind.HEATMAP:  # its numbers are counts; its unit stands on its axis
        drawn.unit(panel.scale.value)
    for place, query in enumerate(panel.queries):
        drawn.with_target(_target(panel.kind, query, "ABCDEF"[place]))
    return drawn


def _target(kind: Kind, query: Query, name: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).ref_id(name).datasource(SOURCE)
    target = target.instant() if kind.is_instant else target.range()
    if kind is Kind.HEATMAP:
        target.format(PromQueryFormat.HEATMAP)
    elif kind is Kind.TABLE:
        target.format(PromQueryFormat.TABLE)
    else:
        target.format(PromQueryFormat.TIME_SERIES)
    return target.legend_format(query.legend) if query.legend else target


def _stat() -> stat.Panel:
    return (
        stat.Panel()
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def _lines(panel: Panel) -> timeseries.Panel:
    stacked = panel.kind is Kind.AREAS
    drawn = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(30 if stacked else 0)
        .show_points(common.VisibilityMode.AUTO)
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        # A model, tier or unit has the same colour in every panel.
        .color_scheme(
            builders.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC_BY_NAME)
        )
    )
    if panel.logarithmic:
        drawn.scale_distribution(
            common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10)
        )
    else:
        drawn.axis_soft_min(0)
    if stacked:
        drawn.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    return drawn


def _heatmap(panel: Panel) -> heatmap.Panel:
    """Buckets come from Prometheus, by `le`; nothing is calculated here."""
    return (
        heatmap.Panel()
        .calculate(False)
        .rows_frame(heatmap.RowsHeatmapOptions().layout(common.HeatmapCellLayout.AUTO))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Blues")
            .scale(HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
            .fill("dark-blue")
            .reverse(False)
        )
        .filter_values(heatmap.FilterValueRange().le(1e-9))  # an empty bucket stays empty
        .y_axis(
            heatmap.YAxisConfig()
            .unit(panel.scale.value)
            .axis_placement(common.AxisPlacement.LEFT)
            .reverse(False)
        )
        .cell_values(heatmap.CellValues().decimals(1))
        .show_legend()
        .show_value(common.VisibilityMode.NEVER)
        .mode(common.TooltipDisplayMode.SINGLE)
        .cell_gap(1)
    )


def _table() -> table.Panel:
    return table.Panel().with_transformation(
        dashboard.DataTransformerConfig(
            id_val="organize",
            options={
                "excludeByName": {"Time": True, "Value": True},
                "renameByName": {"model_name": "model"},
            },
        )
    )


def _thresholds(alarm: float | None) -> builders.ThresholdsConfig:
    steps = [dashboard.Threshold(value=None, color=_CALM)]
    if alarm is not None:
        steps.append(dashboard.Threshold(value=alarm, color=_ALARM))
    return builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)
