"""What is read out of an expression: metrics, and nothing that only looks like one."""

import pytest

from tests.deploy.promql import exported, names_in

READ = {
    "up == 0": {"up"},
    'rate(a_total{b="c_total", d=~"e{2}"}[5m])': {"a_total"},
    "sum by (job, le) (rate(a_bucket[5m])) / on (job) group_left (x) b_count": {
        "a_bucket",
        "b_count",
    },
    "sum(a) without (job) > bool 1e3 and 5m:c:d offset 10m": {"a", ":c:d"},
    "job:a:ratio_rate5m > 14.4 * 0.05": {"job:a:ratio_rate5m"},
    "absent(a) or vector(0) unless time() - b > 0x1f": {"a", "b"},
    "histogram_quantile(0.9, sum by (le) (rate(a_bucket[$__rate_interval])))": {"a_bucket"},
    "topk by (job) (3, a) # not_this": {"a"},
    'label_replace(a, "b", "c_$1", "d", "(e_total.*)")': {"a"},
    "max_over_time(rate(a[5m])[1d:5m] offset 1h)": {"a"},
    "min_over_time(sum(a)[1h:])": {"a"},
    'a{b="}"} + c{d="]"}': {"a", "c"},
    "summary + byte_rate": {"summary", "byte_rate"},
}


@pytest.mark.parametrize("expression", READ)
def test_the_metrics_of_an_expression_are_found(expression):
    assert names_in(expression) == READ[expression]


def test_a_histogram_is_exported_as_its_three_series():
    names = exported()
    assert "elasti_flops_total" in names
    assert {f"elasti_request_capacity_{part}" for part in ("bucket", "sum", "count")} <= names
    assert "elasti_request_capacity" not in names
