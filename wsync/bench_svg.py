"""Results as a picture for a README: a small SVG that browsers, and the sites that host code, draw without scripts.

Each comparison is a pair of bars; a curve of growth is drawn with both axes logarithmic, where a straight line at 45
degrees is linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

from .bench import Result
from .bench_view import aim, amount, ratio, verdict
from .errors import UsageError

_WIDTH, _LINE, _LEFT, _BARS = 860, 20, 230, 300  # pixels
_PLOT = (300, 160)
_OURS, _THEIRS, _TEXT, _FAINT = "#2a7ae2", "#b4b4b4", "#222222", "#777777"
_FONT = "font-family:system-ui,sans-serif;font-size:13px"


def write_svg(path: Path, title: str, results: list[Result]) -> None:
    """Draws what was measured.

    Args:
        title: lines of text above the picture.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.write_bytes(ElementTree.tostring(drawing(title, results), encoding="utf-8", xml_declaration=True))
    except OSError as exc:
        raise UsageError(f"{path} cannot be written ({exc.strerror}). Name another file with --plot.") from exc


def drawing(title: str, results: list[Result]) -> ElementTree.Element:
    """The picture as elements of XML, which escape what the names hold."""
    svg = ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
    ElementTree.SubElement(svg, "rect", {"width": "100%", "height": "100%", "fill": "white"})
    at = 26
    for line in title.splitlines():
        _text(svg, 16, at, line, _FAINT)
        at += _LINE
    for _, found in groupby(results, key=lambda result: (result.case, result.name)):
        group = [result for result in found if result.value is not None]
        if group:
            _text(svg, 16, at + 10, group[0].name, weight="bold")
            at = (_curve if group[0].points else _bars)(svg, at + 10 + _LINE, group)
    size = {"width": str(_WIDTH), "height": str(at + 10), "viewBox": f"0 0 {_WIDTH} {at + 10}"}
    svg.attrib.update(size)
    return svg


def _bars(svg: ElementTree.Element, at: int, group: list[Result]) -> int:
    lines = list(_lines(group))
    most = max(value for _, value, _, _ in lines) or 1.0
    for number, (name, value, told, color) in enumerate(lines):
        y = at + number * _LINE
        length = max(value / most * _BARS, 1)
        _text(svg, 32, y, name)
        box = {"x": str(_LEFT), "y": str(y - 11), "width": f"{length:.1f}", "height": "13", "fill": color}
        ElementTree.SubElement(svg, "rect", box)
        _text(svg, int(_LEFT + length + 8), y, told)
    return at + len(lines) * _LINE


def _lines(group: list[Result]) -> Iterator[tuple[str, float, str, str]]:
    """Name, length, text and colour of each bar."""
    first = group[0]
    assert first.value is not None
    yield "wsync", first.value, f"{amount(first.value, first.unit)}{_aims(first, 'value', first.value)}", _OURS
    for result in group:
        if result.beside_value is not None and result.ratio is not None:
            told = f"{amount(result.beside_value, result.unit)}, wsync is {ratio(result.ratio)} of it"
            yield result.beside, result.beside_value, told + _aims(result, "ratio", result.ratio), _THEIRS


def _aims(result: Result, of: str, figure: float) -> str:
    return "".join(
        f", {verdict(each.met_by(figure))} ({aim(each, result.unit)})" for each in result.aims if each.of == of
    )


def _curve(svg: ElementTree.Element, at: int, group: list[Result]) -> int:
    result = group[0]
    assert result.value is not None
    width, height = _PLOT
    x = [math.log(number) for number, _ in result.points]
    y = [math.log(seconds) for _, seconds in result.points]
    wide, high = max(x) - min(x) or 1.0, max(y) - min(y) or 1.0
    scale = min(width / wide, height / max(high, 1.0))  # the same for both axes, so that 45 degrees are linear
    places = [(32 + (a - min(x)) * scale, at + height - 8 - (b - min(y)) * scale) for a, b in zip(x, y, strict=True)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    ElementTree.SubElement(svg, "polyline", {"points": line, "fill": "none", "stroke": _OURS, "stroke-width": "2"})
    for a, b in places:
        ElementTree.SubElement(svg, "circle", {"cx": f"{a:.1f}", "cy": f"{b:.1f}", "r": "3", "fill": _OURS})
    _text(svg, _LEFT + 150, at, f"grows as {amount(result.value, 'exponent')}{_aims(result, 'value', result.value)}")
    for number, (n, seconds) in enumerate(result.points, 1):
        _text(svg, _LEFT + 150, at + number * _LINE, f"{n:,.0f}: {amount(seconds, 's')}", _FAINT)
    return at + max(height, (len(result.points) + 1) * _LINE) + 10


def _text(svg: ElementTree.Element, x: int, y: int, text: str, color: str = _TEXT, *, weight: str = "normal") -> None:
    style = {"x": str(x), "y": str(y), "fill": color, "style": f"{_FONT};font-weight:{weight}"}
    ElementTree.SubElement(svg, "text", style).text = text
