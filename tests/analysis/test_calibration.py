import json

import pytest

from vaopd.analysis.calibration import accuracies, controls, table, visible


def test_accuracies_come_in_the_order_of_the_seeds(tmp_path):
    for seed, accuracy in ((10, 0.5), (2, 0.25), (1, 0.75)):
        (tmp_path / f"opd-seed{seed}").mkdir()
        (tmp_path / f"opd-seed{seed}" / "eval.json").write_text(json.dumps({"models": {"trained": {"accuracy": accuracy}}}))
    assert list(accuracies(tmp_path).items()) == [(1, 75), (2, 25), (10, 50)]


def by_seed(*values):
    return dict(enumerate(values, 1))


def test_controls_by_hand():
    """Two differences: t with one degree of freedom is 12.706."""
    found = controls(by_seed(60, 62, 61, 65), {1: 50, 4: 53})
    assert found["OPD minus OPD, other seeds"].mean == pytest.approx(2)  # 61-60 and 65-62
    assert found["OPD minus OPD, other seeds"].low == pytest.approx(2 - 12.7062 * 1, rel=1e-4)
    assert found["all steps minus half, same seeds"].mean == pytest.approx(11)  # 10 and 12
    assert found["OPD, all steps"].mean == pytest.approx(62)
    with pytest.raises(ValueError, match="even number"):
        controls(by_seed(1, 2, 3), by_seed(1))
    with pytest.raises(ValueError, match="half the steps"):
        controls(by_seed(1, 2), {3: 1})


def test_visible_difference_by_hand():
    """Runs with a standard deviation of 1: 8 seeds give t(7) = 2.3646 times sqrt(2/8)."""
    assert visible([0, 1, 2], 8) == pytest.approx(2.3646 * 0.5, rel=1e-4)


def test_table_has_a_row_for_every_model():
    text = table(
        {"student": {"parameters": 1234567, "accuracy": 0.4, "se": 0.01, "digits": 0.7, "follows": 0.9}},
        by_seed(60, 62, 61, 65),
        by_seed(50, 51),
    )
    assert "| `builtin:student` | 1,234,567 | 40.0 ± 2.0 | 70.0 | 90.0 |" in text
