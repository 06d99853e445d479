"""Traces from VXP and DICOM waveforms: the same breathing from each, in mm and normalised; what must be refused."""

import numpy as np
import pytest
from made_up_dicom import item, write_object
from pydicom import uid
from pydicom.data import get_testdata_file

from radrepro.core.dicom_layout import DicomError, DicomWarning
from radrepro.data.traces import trace_of
from radrepro.data.traces_dicom import read_recording, read_vxp, read_waveform

T = np.arange(0, 30, 0.04)
CM = 0.3 + 1.1 * np.sin(np.pi * T / 4) ** 4  # dwells at exhale
LAYOUT = "amplitude,phase,timestamp,validflag,ttlin,mark,ttlout"
HEADER = {"Version": "1.6", "Data_layout": LAYOUT, "Patient_ID": "CANARY-ID", "Date": "08-30-2007", "Scale_factor": "10.0"}


def write_vxp(path, *, time_s=T, cm=CM, valid=None, header=HEADER, start_ms=81234):
    valid = np.zeros(len(time_s), int) if valid is None else valid
    columns = header.get("Data_layout", LAYOUT).split(",")
    values = {"phase": np.zeros(len(time_s)), "amplitude": cm, "timestamp": start_ms + 1000 * np.asarray(time_s), "validflag": valid}
    rows = [
        ",".join(f"{values[c][i]:.6g}" if c in ("amplitude", "phase") else f"{values[c][i]:.0f}" if c in values else "" for c in columns)
        for i in range(len(time_s))
    ]
    path.write_text("\n".join(["[Header]", *(f"{k}={v}" for k, v in header.items()), "[Data]", *rows]))
    return path


def write_waveform(path, *, cm=CM, unit="cm", channels=None, sop=uid.RespiratoryWaveformStorage, bits=16, groups=1, **more):
    """Hundredths of a `unit`, with a baseline; `channels`: others before and after the breathing."""
    counts = np.round(100 * (cm - 0.25)).astype(f"<i{bits // 8}")
    interleaved = counts if channels is None else np.stack([counts * 0 + 7, counts, counts * 0 - 7], 1)
    code = item(CodeValue=unit, CodingSchemeDesignator="UCUM", CodeMeaning=unit)
    channel = item(
        ChannelSensitivity=0.01,
        ChannelSensitivityCorrectionFactor=1,
        ChannelBaseline=0.25,
        WaveformBitsStored=bits,
        ChannelSensitivityUnitsSequence=[code],
    )
    group = item(
        **{
            "NumberOfWaveformChannels": 1 if channels is None else 3,
            "NumberOfWaveformSamples": len(counts),
            "SamplingFrequency": 25,
            "WaveformOriginality": "ORIGINAL",
            "WaveformBitsAllocated": bits,
            "WaveformSampleInterpretation": "SS" if bits == 16 else "SB",
            "ChannelDefinitionSequence": [channel] * (1 if channels is None else 3),
            "WaveformData": interleaved.tobytes(),
        }
        | more
    )
    group["WaveformData"].VR = "OW" if bits == 16 else "OB"
    if "WaveformPaddingValue" in group:
        group["WaveformPaddingValue"].VR = "OW"
    return write_object(path, sop, WaveformSequence=[group] * groups)


def test_vxp_in_mm_and_normalised(tmp_path):
    path = write_vxp(tmp_path / "a.vxp")
    np.testing.assert_allclose(read_vxp(path, normalise=False), 10 * CM, atol=1e-3)
    assert read_vxp(path, normalise=False).attrs["units"] == "mm" and float(read_vxp(path).time[0]) == 0
    np.testing.assert_allclose(read_vxp(path), trace_of(T, CM), atol=1e-4)
    other = HEADER | {"Data_layout": "timestamp,amplitude,validflag", "Scale_factor": "1"}
    np.testing.assert_allclose(read_vxp(write_vxp(path, header=other), normalise=False), CM, atol=1e-4)


def test_vxp_samples_that_are_not_valid(tmp_path):
    valid, spoilt = np.zeros(len(T), int), CM.copy()
    valid[:50], valid[300:303] = -1, 1
    spoilt[valid != 0] = 99
    with pytest.warns(DicomWarning, match="a.vxp: 53 of 750"):
        trace = read_vxp(write_vxp(tmp_path / "a.vxp", cm=spoilt, valid=valid), normalise=False)
    assert float(trace.time[0]) == pytest.approx(2) and float(trace.max()) < 14.1
    valid[300:330] = 1
    with pytest.warns(DicomWarning) as said:
        read_vxp(write_vxp(tmp_path / "a.vxp", valid=valid))
    assert any("1 gaps of up to 1.2 s" in str(w.message) for w in said)
    with pytest.raises(ValueError, match="most samples"):
        read_vxp(write_vxp(tmp_path / "a.vxp", valid=np.ones(len(T), int)))


def test_vxp_that_is_refused(tmp_path):
    path, back = tmp_path / "a.vxp", T.copy()
    back[400:] -= 5
    holed = CM.copy()
    holed[9] = np.nan
    less = {k: v for k, v in HEADER.items() if k not in ("Scale_factor",)}
    for make, text in (
        (lambda: write_vxp(path, time_s=back), "forward"),
        (lambda: write_vxp(path, cm=holed), "finite"),
        (lambda: write_vxp(path, header=HEADER | {"Data_layout": "phase,timestamp"}), "Data_layout"),
        (lambda: write_vxp(path, time_s=T[:2], cm=CM[:2]), "3 different"),
        (lambda: write_vxp(path, cm=0 * CM), "does not move"),
        (lambda: path.write_text("hello") and path, "another kind"),
        (lambda: path.write_text(write_vxp(path).read_text() + "\n1.0,x") and path, "numbers in every line"),
    ):
        make()
        with pytest.raises(ValueError, match=text) as error:
            read_vxp(path)
        assert str(error.value).startswith("a.vxp: ") and "CANARY" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="Scale_factor"):
        read_vxp(write_vxp(path, header=less), normalise=False)
    assert read_vxp(path).attrs["units"] == "1"  # normalised, it needs no unit
    with pytest.raises(FileNotFoundError):
        read_vxp(tmp_path / "none.vxp")


@pytest.mark.parametrize("unit,mm", [("cm", 10.0), ("mm", 1.0), ("m", 1000.0)])
def test_waveform_with_sensitivity_baseline_and_unit(tmp_path, unit, mm):
    trace = read_waveform(write_waveform(tmp_path / "w.dcm", unit=unit), normalise=False)
    np.testing.assert_allclose(trace, mm * CM, atol=0.0051 * mm)
    np.testing.assert_allclose(trace.time, T, atol=1e-9)
    np.testing.assert_allclose(read_waveform(tmp_path / "w.dcm"), trace_of(T, CM), atol=0.01)


def test_waveform_channels_offset_padding_and_bytes(tmp_path):
    path = tmp_path / "w.dcm"
    write_waveform(path, channels="many", sop=uid.MultichannelRespiratoryWaveformStorage)
    np.testing.assert_allclose(read_waveform(path, channel=1, normalise=False), 10 * CM, atol=0.051)
    for channel in (None, 3, -1):
        with pytest.raises(DicomError, match="3 channels: pass channel=0 to 2"):
            read_waveform(path, channel=channel)
    late = read_waveform(write_waveform(path, MultiplexGroupTimeOffset=1500.0))
    assert float(late.time[0]) == 1.5
    padded = CM.copy()
    padded[100:105] = 0.25 - 99  # count -9900
    with pytest.warns(DicomWarning, match="5 of 750 samples are padding"):
        trace = read_waveform(write_waveform(path, cm=padded, WaveformPaddingValue=np.int16(-9900).tobytes()), normalise=False)
    assert float(trace.min()) > 2.9
    np.testing.assert_allclose(read_waveform(write_waveform(path, bits=8), normalise=False), 10 * CM, atol=0.051)


def test_waveform_that_is_refused(tmp_path):
    path = tmp_path / "w.dcm"
    for more, tag in (
        ({"groups": 2}, "5400,0100"),
        ({"NumberOfWaveformSamples": 751}, "5400,1010"),
        ({"SamplingFrequency": 0}, "003A,001A"),
        ({"SamplingFrequency": "1E-12"}, "003A,001A.*at most 24 h"),
        ({"SamplingFrequency": "5E-324"}, "003A,001A.*at most 24 h"),
        ({"ChannelDefinitionSequence": []}, "003A,0200"),
        ({"NumberOfWaveformChannels": 0}, "003A,0005"),
    ):
        with pytest.raises(DicomError, match=tag):
            read_waveform(write_waveform(path, **more))
    with pytest.raises(DicomError, match="003A,0211"):
        read_waveform(write_waveform(path, unit="%"), normalise=False)
    assert float(read_waveform(path).quantile(0.95)) == pytest.approx(1)
    with pytest.raises(DicomError, match="12-lead ECG"):
        read_waveform(get_testdata_file("waveform_ecg.dcm"))


def test_one_breathing_from_three_kinds_of_file(tmp_path):
    (tmp_path / "a.csv").write_text("time_s,amplitude\n" + "\n".join(f"{t},{a}" for t, a in zip(T, CM)))
    write_vxp(tmp_path / "a.VXP")
    write_waveform(tmp_path / "a")
    for name in ("a.csv", "a.VXP", "a"):
        np.testing.assert_allclose(read_recording(tmp_path / name), trace_of(T, CM), atol=0.01)
