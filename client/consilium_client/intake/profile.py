"""The attributes that stay when an instance is de-identified; every other one goes, known or not.

After DICOM PS3.15 Annex E, Basic Application Level Confidentiality Profile. That lists what must go; this lists what
may stay, which holds for attributes of later editions and of vendors, too. Text stays nowhere but in the device's make:
coded values stay where they are on a list of the standard's terms, and everything else is a number, a date or a UID.
"""

from __future__ import annotations

from typing import Final

from pydicom.datadict import tag_for_keyword


def _tag(keyword: str) -> int:
    found = tag_for_keyword(keyword)
    if found is None:
        raise ValueError(f"{keyword} is no attribute of DICOM's")
    return found


def _tags(words: str) -> frozenset[int]:
    return frozenset(_tag(word) for word in words.split())


def _terms(words: str) -> frozenset[str]:
    """Terms between blanks; between commas where some have blanks in them."""
    return frozenset(word.strip() for word in words.split("," if "," in words else None))


NUMBERS: Final = _tags("""
    SamplesPerPixel PlanarConfiguration Rows Columns NumberOfFrames BitsAllocated BitsStored HighBit PixelRepresentation
    SmallestImagePixelValue LargestImagePixelValue PixelPaddingValue PixelPaddingRangeLimit PixelAspectRatio
    PixelSpacing ImagerPixelSpacing NominalScannedPixelSpacing PixelIntensityRelationshipSign RescaleIntercept
    RescaleSlope
    WindowCenter WindowWidth LUTDescriptor SliceThickness SpacingBetweenSlices ImagePositionPatient
    ImageOrientationPatient SliceLocation GantryDetectorTilt ReconstructionDiameter DataCollectionDiameter KVP
    ExposureTime XRayTubeCurrent Exposure ExposureInuAs DistanceSourceToDetector DistanceSourceToPatient
    EstimatedRadiographicMagnificationFactor BodyPartThickness CompressionForce RepetitionTime EchoTime InversionTime
    FlipAngle EchoTrainLength EchoNumbers MagneticFieldStrength NumberOfAverages ImagingFrequency FrameTime
    FrameTimeVector CineRate InstanceNumber SeriesNumber AcquisitionNumber TemporalPositionIndex InStackPositionNumber
    DimensionIndexValues LossyImageCompressionRatio DimensionIndexPointer FunctionalGroupPointer FrameIncrementPointer
    SegmentNumber ReferencedSegmentNumber ReferencedFrameNumber MaximumFractionalValue
    RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor BluePaletteColorLookupTableDescriptor
""")
TABLES: Final = {
    _tag(f"{prefix}Data"): _tag(f"{prefix.removeprefix('Segmented')}Descriptor")
    for prefix in (
        "LUT",
        *(
            f"{form}{colour}PaletteColorLookupTable"
            for form in ("", "Segmented")
            for colour in ("Red", "Green", "Blue")
        ),
    )
}
"""Values of lookup tables, by the descriptor that says how many there are; more go."""
PIXELS: Final = _tag("PixelData")
OFFSETS: Final = _tags("ExtendedOffsetTable ExtendedOffsetTableLengths")
"""Places of a compressed picture's frames in it."""
UIDS: Final = _tags("""
    SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID ReferencedSOPClassUID
    ReferencedSOPInstanceUID DimensionOrganizationUID ConcatenationUID SynchronizationFrameOfReferenceUID
""")
DATES: Final = _tags("StudyDate SeriesDate AcquisitionDate ContentDate")
TIMES: Final = _tags("StudyTime SeriesTime AcquisitionTime ContentTime")
"""Option ``times``."""
MAKE: Final = _tags("Manufacturer ManufacturerModelName")
"""Option ``device``: the one text that stays, and not where a word of the patient's name or identifier stands in it."""
AGE: Final = _tag("PatientAge")
BODY: Final = _tags("PatientSize PatientWeight")
"""Option ``patient-characteristics``, with sex and age."""
OLDEST: Final = 89
"""Ages above stand for one another: there are few such people."""

_REGIONS = """ABDOMEN ABDOMENPELVIS ADRENAL ANKLE AORTA ARM AXILLA BACK BLADDER BRAIN BREAST BRONCHUS BUTTOCK CALCANEUS
CALF CAROTID CEREBELLUM CERVIX CHEEK CHEST CHESTABDOMEN CHESTABDPELVIS CIRCLEOFWILLIS CLAVICLE COCCYX COLON CORNEA
CORONARYARTERY CSPINE CTSPINE DUODENUM EAR ELBOW ESOPHAGUS EXTREMITY EYE EYELID FACE FEMUR FINGER FOOT FOREARM
GALLBLADDER HAND HEAD HEADNECK HEART HIP HUMERUS IAC ILEUM ILIUM JAW JEJUNUM KIDNEY KNEE LARYNX LEG LIVER LSPINE
LSSPINE LUNG MAXILLA MEDIASTINUM MOUTH NECK NOSE ORBIT OVARY PANCREAS PARATHYROID PAROTID PATELLA PELVIS PENIS PHARYNX
PROSTATE RADIUS RADIUSULNA RECTUM RIB SACRUM SCALP SCAPULA SCLERA SCROTUM SHOULDER SIJOINT SKULL SPINE SPLEEN SSPINE
STERNUM STOMACH SUBMANDIBULAR TESTIS THIGH THUMB THYMUS THYROID TIBIA TIBIAFIBULA TLSPINE TMJ TOE TONGUE TRACHEA
TSPINE ULNA URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA"""
_IMAGE_TYPES = _terms("""
    ORIGINAL, DERIVED, PRIMARY, SECONDARY, AXIAL, LOCALIZER, MPR, REFORMATTED, AVERAGE, MIN_IP, MIXED, VOLUME, M, P, R,
    I, FFE, SE, IR, DIFFUSION, T1, T2, T2_STAR, NONE, OTHER, PROJECTION IMAGE, RESAMPLED, FILTERED, ADDITION,
    SUBTRACTION, DIVISION, MASK, WHOLE BODY, STATIC, DYNAMIC, GATED, TOMO, RECON TOMO, EMISSION, TRANSMISSION,
    SINGLE PLANE,
    BIPLANE A, BIPLANE B, TOMOSYNTHESIS, GENERATED_2D, LEFT, RIGHT""")
_LISTS: Final = {
    "Modality": "CR DX MG IO PX CT MR US XA RF NM PT OT SC ES GM SM OP OPT OCT XC DG RG SEG RTDOSE IVUS IVOCT",
    "PhotometricInterpretation": """MONOCHROME1, MONOCHROME2, PALETTE COLOR, RGB, YBR_FULL, YBR_FULL_422,
        YBR_PARTIAL_420, YBR_ICT, YBR_RCT""",
    "PresentationLUTShape": "IDENTITY INVERSE",
    "PixelIntensityRelationship": "LIN LOG DISP",
    "VOILUTFunction": "LINEAR LINEAR_EXACT SIGMOID",
    "PresentationIntentType": "FOR PRESENTATION, FOR PROCESSING",
    "BodyPartExamined": _REGIONS,
    "ViewPosition": "AP PA LL RL RLD LLD RLO LLO LAO RAO LPO RPO CC MLO ML LM XCC XCCL XCCM FB SIO LMO LATERAL LAT",
    "Laterality": "L R B U",
    "ImageLaterality": "L R B U",
    "FrameLaterality": "L R B U",
    "PatientPosition": "HFS HFP HFDR HFDL FFS FFP FFDR FFDL LFP LFS RFP RFS AFDR AFDL PFDR PFDL",
    "BurnedInAnnotation": "NO YES",
    "RecognizableVisualFeatures": "NO YES",
    "LossyImageCompression": "00 01",
    "LossyImageCompressionMethod": "ISO_10918_1 ISO_14495_1 ISO_15444_1 ISO_13818_2",
    "ScanningSequence": "SE IR GR EP RM",
    "SequenceVariant": "SK MTC SS TRSS SP MP OSP NONE",
    "MRAcquisitionType": "2D 3D",
    "ComplexImageComponent": "MAGNITUDE PHASE REAL IMAGINARY MIXED",
    "VolumetricProperties": "VOLUME SAMPLED DISTORTED MIXED",
    "RescaleType": "HU US OD PCT Z_EFF ED GML CNTS BQML",
    "SegmentationType": "BINARY FRACTIONAL LABELMAP",
    "SegmentationFractionalType": "PROBABILITY OCCUPANCY",
    "SegmentAlgorithmType": "AUTOMATIC SEMIAUTOMATIC MANUAL",
    "Units": "CNTS BQML CPS PCNT GML HU NONE",
    "DimensionOrganizationType": "3D 3D_TEMPORAL TILED_FULL TILED_SPARSE",
}
CODES: Final = {
    **{_tag(keyword): _terms(words) for keyword, words in _LISTS.items()},
    _tag("ImageType"): _IMAGE_TYPES,
    _tag("FrameType"): _IMAGE_TYPES,
}
"""Coded values that stay, of each attribute; any other value goes. Of an attribute with several, each is held alone."""
DIRECTIONS: Final = _tag("PatientOrientation")
"""Up to three of the letters A P R L F H for each axis."""
SEX: Final = _tag("PatientSex")
SEXES: Final = _terms("M F O")

SEQUENCES: Final = _tags("""
    ModalityLUTSequence VOILUTSequence SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence
    PixelMeasuresSequence PlanePositionSequence PlaneOrientationSequence FrameVOILUTSequence FrameContentSequence
    PixelValueTransformationSequence FrameAnatomySequence AnatomicRegionSequence ViewCodeSequence
    ViewModifierCodeSequence DimensionIndexSequence DimensionOrganizationSequence CTImageFrameTypeSequence
    MRImageFrameTypeSequence MRTimingAndRelatedParametersSequence MREchoSequence DerivationImageSequence
    SourceImageSequence ReferencedSeriesSequence ReferencedInstanceSequence SegmentSequence
    SegmentIdentificationSequence SegmentedPropertyCategoryCodeSequence SegmentedPropertyTypeCodeSequence
""")
"""Sequences whose items stay, each item held against this same list."""
DEPTH: Final = 8

SCHEME: Final = _tag("CodingSchemeDesignator")
CODE: Final = _tag("CodeValue")
SCHEMES: Final = {
    "SCT": "[0-9]{6,18}",
    **dict.fromkeys(("SRT", "SNM3", "99SDM"), "[A-Z][A-Z0-9]?-(?=[A-Z]*[0-9])[0-9A-Z]{4,6}"),
    "DCM": "[0-9]{6}|[A-Z]{2,4}",
    "LN": "[0-9]{1,7}-[0-9]",
    "UCUM": r"[A-Za-z0-9.\-]{1,8}",
    "RADLEX": "RID[0-9]{1,8}",
    "FMA": "[0-9]{1,8}",
}
"""Coding schemes that anybody can look up, and the form of their codes. A code of the hospital's own may name a person;
the meaning is text."""

METHOD: Final = "Consilium, after DICOM PS3.15 Annex E"
METHODS: Final = {
    "": ("113100", "Basic Application Confidentiality Profile"),
    "dates": ("113107", "Retain Longitudinal Temporal Information Modified Dates Option"),
    "patient-characteristics": ("113108", "Retain Patient Characteristics Option"),
    "device": ("113109", "Retain Device Identity Option"),
}
