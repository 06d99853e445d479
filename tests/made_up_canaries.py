"""Canaries: values that occur nowhere else, planted in every element of a DICOM object that could tell who a patient is."""
from datetime import date, timedelta
from itertools import count

import pydicom
from made_up_dicom import item
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement

from radrepro.data.privacy_profile import ALLOWED

PLANTED_VR = {"PN", "LO", "SH", "LT", "ST", "UT", "UC", "UR", "AE", "DA", "DT", "TM", "UI", "AS", "CS", "UN", "OB", "OW", "OF", "OB or OW"}
SPARED = {
    "SpecificCharacterSet",
    "BurnedInAnnotation",
    "SOPClassUID",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "TransferSyntaxUID",
    "PatientID",
    "AcquisitionDateTime",
    "PixelDataProviderURL",
    "CodeValue",
    "CodingSchemeDesignator",
}
OF_VR = [[t for t, e in DicomDictionary.items() if e[0] == vr and t not in ALLOWED] for vr in sorted(PLANTED_VR)]


def day(n):
    """Days 37 apart, so that none becomes another one when all are moved."""
    return (date(1601, 1, 1) + timedelta(37 * n)).strftime("%Y%m%d")


class Canaries:
    """Values that occur nowhere else, each once; `values`: all that were given out, as text."""

    def __init__(self):
        self.values, self.number, self.days = [], count(), count()

    def of(self, vr):
        n = next(self.days if vr in ("DA", "DT") else self.number)
        value = {
            "PN": f"CANARY{n}^X",
            "UI": f"1.2.999.7777777.{n}",
            "DA": day(n),
            "DT": day(n) + "171733",
            "TM": f"1717{n % 60:02d}.{n:06d}",
            "AS": f"{n % 900 + 100}Y",
            "CS": f"CANARY_{n}",
            "UR": f"http://canary/{n}",
        }.get(vr, f"CANARY{n}")
        self.values.append(value[:8] if vr == "DT" else value)
        return (value + "\0" * (-len(value) % 8)).encode() if vr in ("UN", "OB", "OW", "OF", "OB or OW") else value

    def add(self, ds, tag, vr):
        ds.add(DataElement(tag, vr.split()[0], self.of(vr), validation_mode=pydicom.config.IGNORE))

    def plant(self, ds, *, top=True):
        """A canary into every text, date, UID or byte of the standard that `ds` does not need, private blocks, overlays, its sequences."""
        kept = {
            e.tag for e in ds if e.tag in ALLOWED and (e.VR in ("CS", "UI", "DA") or e.keyword in ("ROIName", "BeamName", "RescaleType"))
        }
        for sequence in [e for e in ds if e.VR == "SQ" and e.tag in ALLOWED]:
            for i in list(sequence.value)[:6]:
                self.plant(i, top=False)
        tags = DicomDictionary if top else [t for of_vr in OF_VR for t in of_vr[:: max(len(of_vr) // 3, 1)]] + list(ds.keys())
        for tag in tags:
            vr, _, _, _, keyword = DicomDictionary[tag]
            if (
                vr in PLANTED_VR
                and tag >> 16 not in (0, 2, 4, 0xFFFA, 0xFFFE)
                and tag not in kept
                and keyword not in SPARED
                and (tag != 0x54001010)
            ):
                self.add(ds, tag, vr)
            elif (
                vr == "SQ"
                and tag not in ALLOWED
                and (top and tag % 3 == 0 or keyword in ("ReferencedPatientSequence", "IconImageSequence"))
            ):
                deep = item(PatientName=self.of("PN"), TextValue=self.of("UT"), ReferencedSOPInstanceUID=self.of("UI"))
                ds.add(DataElement(tag, "SQ", [item(RequestAttributesSequence=[deep])]))
        block = ds.private_block(0x0009, "CANARY creator", create=True)
        self.values.append("CANARY creator")
        for offset, vr in enumerate(("LO", "UN", "OB", "PN", "DA")):
            block.add_new(offset, vr, self.of(vr))
        block.add_new(16, "SQ", [item(PatientComments=self.of("LT"))])
        if top:
            for tag, vr in ((0x60003000, "OW"), (0x60000022, "LO"), (0x50003000, "OW"), (0xFFFCFFFC, "OB"), (0x00080061, "CS")):
                self.add(ds, tag, vr)
