"""Traces: normalisation, rate and slice times against closed forms; what must be refused; the real recordings."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radrepro.data.traces import amplitude_rate, find_traces, read_trace, slice_amplitudes, synthetic_trace, trace_of

Z_MM = np.linspace(-160, 160, 57)


def sine(period_s=4.0, duration_s=60.0):
    t = np.arange(0, duration_s, 0.04)
    return trace_of(t, 0.5 - 0.5 * np.cos(2 * np.pi * t / period_s), normalise=False)


@settings(max_examples=20, deadline=None)
@given(start_s=st.floats(1, 50), scan_s=st.floats(1, 6), direction=st.sampled_from([-1, 1]))
def test_every_slice_has_its_own_time_amplitude_and_rate(start_s, scan_s, direction):
    seen = slice_amplitudes(sine(), Z_MM, start_s=start_s, scan_s=scan_s, direction=direction)
    part = (Z_MM - Z_MM[0]) / np.ptp(Z_MM)
    t = start_s + scan_s * (part if direction == 1 else 1 - part)
    np.testing.assert_allclose(seen.amplitude["time"], t)
    np.testing.assert_allclose(seen.amplitude, 0.5 - 0.5 * np.cos(np.pi * t / 2), atol=0.012)  # 0.1 s of smoothing
    np.testing.assert_allclose(seen.rate, np.pi / 4 * np.sin(np.pi * t / 2), atol=0.02)


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(0.01, 1e4), offset=st.floats(-1e4, 1e4), flip=st.booleans())
def test_normalising_forgets_unit_offset_and_sign(scale, offset, flip):
    t = np.arange(0, 60, 0.05)
    shape = np.sin(np.pi * t / 4) ** 4  # dwells at exhale
    np.testing.assert_allclose(trace_of(t, offset + (-scale if flip else scale) * shape), trace_of(t, shape), atol=1e-6)


def test_uneven_repeated_and_unsorted_samples():
    t = np.arange(0, 30, 0.1)
    order = np.random.default_rng(0).permutation(len(t))
    want = trace_of(t, t, normalise=False)
    np.testing.assert_allclose(trace_of(t[order], t[order], normalise=False), want, atol=1e-9)
    doubled = trace_of(np.r_[t, t], np.r_[t - 1, t + 1], normalise=False)
    np.testing.assert_allclose(doubled, want, atol=1e-9)


def test_synthetic_breathing_is_irregular_and_by_seed():
    a = synthetic_trace(200, seed=1)
    assert a.identical(synthetic_trace(200, seed=1)) and not a.equals(synthetic_trace(200, seed=2))
    peaks = [float(c.max()) for c in np.array_split(a.values, 25)]
    assert np.std(peaks) > 0.05 and np.isfinite(a).all()
    assert np.quantile(a, 0.05) == pytest.approx(0) and np.quantile(a, 0.95) == pytest.approx(1)
    assert abs(amplitude_rate(a).rate).max() < 5
    with pytest.raises(ValueError, match="at least|>= 10"):
        synthetic_trace(3, seed=1)


def test_padding_holds_still_and_too_short_is_refused():
    short = sine(duration_s=10)
    with pytest.raises(ValueError, match="longer trace"):
        slice_amplitudes(short, Z_MM, start_s=8, scan_s=3)
    seen = slice_amplitudes(short, Z_MM, start_s=8, scan_s=3, pad_s=1.1)
    assert (seen.rate[-10:] == 0).all() and np.ptp(seen.amplitude.values[-10:]) == 0
    with pytest.raises(ValueError, match="NaN"):
        slice_amplitudes(short.where(short.time < 5), Z_MM, start_s=2, scan_s=3)
    with pytest.raises(ValueError, match="direction"):
        slice_amplitudes(short, Z_MM, start_s=2, scan_s=3, direction=0)


@pytest.mark.parametrize("table, words", [({"time_s": [0, 1, 2], "height": [0, 1, 0]}, "columns"),
                                          ({"time_s": [0, 1, 2], "amplitude": [0, np.nan, 0]}, "NaN"),
                                          ({"time_s": [0, 1, 2], "amplitude": [3, 3, 3]}, "does not move"),
                                          ({"time_s": [0, 1, 1e13], "amplitude": [0, 1, 0]}, "at most 24 h"),
                                          ({"time_s": [-1e308, 1, 1e308], "amplitude": [0, 1, 0]}, "at most 24 h"),
                                          ({"time_s": [0, 0, 1], "amplitude": [1, 2, 3]}, "too short")])
def test_bad_files_say_what_is_wrong(tmp_path, table, words):
    pd.DataFrame(table).to_csv(tmp_path / "bad.csv", index=False)
    with pytest.raises(ValueError, match=f"bad.csv.*{words}"):
        read_trace(tmp_path / "bad.csv")


def test_missing_files(tmp_path):
    assert find_traces(tmp_path) == []
    for call in (lambda: find_traces(tmp_path / "none"), lambda: read_trace(tmp_path / "none.csv")):
        with pytest.raises(FileNotFoundError, match="found none"):
            call()


def test_real_recordings():
    data_dir = os.environ.get("RADREPRO_DATA")
    if not data_dir or not Path(data_dir).is_dir():
        pytest.skip("RADREPRO_DATA is not set or names no folder")
    traces = find_traces(data_dir)
    if not traces:
        pytest.skip("no traces_* folder in RADREPRO_DATA")
    for path in traces:
        trace = read_trace(path)
        assert float(trace.median()) <= 0.5 + 1e-9
        seen = slice_amplitudes(trace, Z_MM, start_s=float(trace.time[0]) + 5, scan_s=3)
        assert np.isfinite(seen.rate).all() and abs(seen.rate).max() < 12
