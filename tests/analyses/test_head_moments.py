import numpy as np
import pytest
import torch
from attnlab_analyses.moments import HeadMoments
from hypothesis import given, settings
from hypothesis import strategies as st


def test_mean_and_standard_error_are_numpys():
    values = torch.randn(7, 3, dtype=torch.float64)
    moments = HeadMoments((3, 3))
    moments.add(1, values[:2])
    moments.add(1, values[2:])
    expected = values.numpy()
    np.testing.assert_allclose(moments.mean[1], expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.stderr()[1], expected.std(0, ddof=1) / np.sqrt(7), rtol=1e-12)


def test_one_sample_has_no_standard_error():
    moments = HeadMoments((2,))
    moments.add(0, torch.tensor([[1.0, float("nan")]]))
    assert moments.stderr()[0].isnan().all()
    assert moments.count[0].tolist() == [1, 0]


def test_a_small_spread_beside_a_large_mean_keeps_its_digits():
    values = 1e8 + torch.arange(10, dtype=torch.float64)[:, None]
    moments = HeadMoments((1,))
    for value in values:
        moments.add(0, value[None])
    assert moments.sd()[0, 0].item() == pytest.approx(np.std(np.arange(10), ddof=1), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=4), min_size=1, max_size=4))
def test_merging_parts_equals_taking_all_at_once(parts):
    whole, merged = HeadMoments((1,)), HeadMoments((1,))
    whole.add(0, torch.tensor([v for part in parts for v in part], dtype=torch.float64)[:, None])
    for part in parts:
        one = HeadMoments((1,))
        one.add(0, torch.tensor(part, dtype=torch.float64)[:, None])
        merged.merge(one)
    np.testing.assert_allclose(merged.mean, whole.mean, atol=1e-9)
    np.testing.assert_allclose(merged.m2, whole.m2, atol=1e-6)


def test_the_state_comes_back_as_it_was():
    moments, other = HeadMoments((2,)), HeadMoments((2,))
    moments.add(0, torch.tensor([[1.0, 2.0], [4.0, 8.0]]))
    other.load_state_dict(moments.state_dict("x"), "x")
    assert torch.equal(other.stderr(), moments.stderr())
