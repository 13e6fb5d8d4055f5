"""Units in UCUM's spelling, and values in one unit as values in another.

pint knows what the units are; this knows how UCUM spells those that hospitals use. A spelling that is not known is not
guessed: the value is set aside.
"""

from __future__ import annotations

import math
import re
from functools import cache, lru_cache
from typing import Any

import pint

from consilium_shared.errors import DataError

_ATOMS = {
    "g": "gram", "m": "meter", "s": "second", "min": "minute", "h": "hour", "d": "day", "wk": "week", "mo": "month",
    "a": "year", "l": "liter", "L": "liter", "mol": "mole", "Pa": "pascal", "bar": "bar", "J": "joule",
    "cal": "calorie", "W": "watt", "V": "volt", "A": "ampere", "Hz": "hertz", "K": "kelvin", "Cel": "degC",
    "[degF]": "degF", "%": "percent", "m[Hg]": "mmHg * 1000", "cm[H2O]": "cmH2O", "[in_i]": "inch", "[ft_i]": "foot",
    "[lb_av]": "pound", "[oz_av]": "ounce", "U": "ucum_enzyme_unit", "kat": "katal", "[IU]": "ucum_iu",
    "[iU]": "ucum_iu", "eq": "ucum_equivalent", "osm": "ucum_osmole", "[pH]": "ucum_ph", "[arb'U]": "ucum_arbitrary",
    "1": "dimensionless", "deg": "degree", "[drp]": "ucum_drop", "bit_s": "bit",
}  # fmt: skip
_PREFIXES = {"k": 3, "c": -2, "d": -1, "m": -3, "u": -6, "n": -9, "p": -12, "f": -15, "M": 6, "G": 9, "h": 2, "da": 1}
_PLAIN = {"min", "h", "d", "wk", "mo", "a", "Cel", "[degF]", "%", "1", "[in_i]", "[ft_i]", "[lb_av]", "[oz_av]", "[pH]"}
"""Units of UCUM that take no prefix."""
_TERM = re.compile(
    r"(?P<ten>10[*^](?P<power>[+-]?[0-9]{1,2}))"
    r"|(?P<atom>[^0-9+\-./{}][^+\-./{}0-9]*(?:2O\])?|1|%)(?P<exponent>[+-]?[0-9])?"
)
_NOTE = re.compile(r"\{[^{}]*\}")
_NOTE_ALONE = re.compile(r"(?<![^./])\{[^{}]*\}")
"""Annotation that makes up a whole term, as in ``{beats}/min``; it counts as the number one."""
_LONGEST = 60


@cache
def _registry() -> Any:
    registry = pint.UnitRegistry(autoconvert_offset_to_baseunit=False)
    for name in ("enzyme_unit", "iu", "equivalent", "osmole", "ph", "arbitrary", "drop"):
        registry.define(f"ucum_{name} = [ucum_{name}]")  # each a kind of its own: none is converted into another
    return registry


def check(unit: str) -> str:
    """The unit itself; raises ValueError where it is none that is known in UCUM's spelling.

    >>> check("mg/dL")
    'mg/dL'
    """
    try:
        _parsed(unit)
    except DataError as error:
        raise ValueError(str(error)) from None
    return unit


@lru_cache(4096)
def factor(unit: str, wanted: str, molar_mass: float | None = None) -> tuple[float, float]:
    """Numbers (a, b) by which a value in one unit is one in another: ``a * value + b``.

    Args:
        unit: unit of the value, in UCUM's spelling.
        wanted: unit of the result, in UCUM's spelling.
        molar_mass: g/mol of the substance, where an amount becomes a mass or the other way round.

    Raises:
        DataError: a unit that is not known, or one that cannot become the other.

    >>> round(factor("mmol/L", "mg/dL", 180.156)[0], 3)
    18.016
    """
    one, other = _parsed(unit), _parsed(wanted)
    mass = None if molar_mass is None else _registry().Quantity(molar_mass, "gram / mole")
    for through in (None, mass, None if mass is None else 1 / mass):
        try:
            zero, step = (_become(one, other, value, through) for value in (0.0, 1.0))
        except pint.errors.PintError:
            continue
        return step - zero, zero
    raise DataError(f"unit {unit} cannot become {wanted}" + ("" if mass else " (no molar_mass is declared)"))


def _become(one: Any, other: Any, value: float, through: Any) -> float:
    registry = _registry()
    scale, unit = one
    quantity = registry.Quantity(value * scale, unit)
    if through is not None:
        quantity = quantity * through
    wanted_scale, wanted = other
    return float(quantity.to(wanted).magnitude) / float(wanted_scale)


@lru_cache(4096)  # a source may spell one unit in any number of ways
def _parsed(unit: str) -> tuple[float, Any]:
    """A factor and a unit of pint's."""
    text = _NOTE.sub("", _NOTE_ALONE.sub("1", unit.strip()))
    if not unit.strip() or len(unit) > _LONGEST:
        raise DataError("a value without a unit")
    scale, made, divided = 1.0, _registry().Unit("dimensionless"), False
    for position, part in enumerate(re.split(r"([./])", text)):
        if part in {".", "/"}:
            divided = part == "/"
            continue
        if part == "" and position == 0:
            continue
        number, atom, exponent = _term(part, unit)
        power = -exponent if divided else exponent
        scale *= float(number**power)
        made = made * atom**power
    if not 0 < scale < math.inf:
        raise DataError(f"unit {unit!r}, which no value can be in")
    return scale, made


def _term(part: str, whole: str) -> tuple[float, Any, int]:
    found = _TERM.fullmatch(part)
    registry = _registry()
    if found is None:
        raise DataError(f"unit {whole[:_LONGEST]!r}, which is none of UCUM's that this program knows")
    if found["ten"]:
        return 10.0 ** int(found["power"]), registry.Unit("dimensionless"), 1
    atom, exponent = found["atom"], int(found["exponent"] or 1)
    if atom in _ATOMS:
        return (*_atom(atom), exponent)
    for prefix in sorted(_PREFIXES, key=len, reverse=True):
        rest = atom.removeprefix(prefix)
        if atom.startswith(prefix) and rest in _ATOMS and rest not in _PLAIN:
            number, unit = _atom(rest)
            return number * 10.0 ** _PREFIXES[prefix], unit, exponent
    raise DataError(f"unit {whole[:_LONGEST]!r}, which is none of UCUM's that this program knows")


def _atom(atom: str) -> tuple[float, Any]:
    name, _, number = _ATOMS[atom].partition(" * ")
    return float(number or 1), _registry().Unit(name)
