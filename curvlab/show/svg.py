"""Write a figure as SVG that stands within a page.

Its names are its own, nothing in it reaches outside, and it is the same bytes every time.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import matplotlib as mpl
from matplotlib.figure import Figure

from curvlab.show.drawable import picture
from curvlab.system.escape import for_xml

_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")


def inline(figure: Figure, prefix: str, label: str) -> str:
    """Return the figure as an `<svg>` element of HTML, read aloud as `label`.

    Every id is under `prefix`.

    Letters are outlines, so that the page needs no font. Comments, metadata and the style sheet go,
    which would hold for the whole page (`*{stroke-linejoin: round; stroke-linecap: butt}`: the
    page's own has it for figures).

    Raises:
        CurvlabError: the figure cannot be drawn.
    """
    with mpl.rc_context(
        {"svg.hashsalt": "curvlab", "svg.fonttype": "path", "svg.image_inline": True}
    ):
        root = ET.fromstring(picture(figure, "svg", metadata={"Date": None}, dpi="figure"))
    _drop(root, ("metadata", "style"))
    used = set()
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF))
        used |= {element.get("href", "").removeprefix("#")}
        used |= {name for value in element.attrib.values() for name in _REFERENCE.findall(value)}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
            elif key == "id" or (key == "href" and value.startswith("#")):
                element.set(key, f"#{prefix}{value[1:]}" if key == "href" else prefix + value)
            else:
                element.set(key, _REFERENCE.sub(rf"url(#{prefix}\1)", value))
    root.attrib = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": root.attrib["viewBox"]} | {
        "role": "img",
        "aria-label": for_xml(label),
        "width": root.attrib["width"],
        "height": root.attrib["height"],
    }
    return ET.tostring(root, encoding="unicode")


def _drop(root: ET.Element, names: tuple[str, ...]) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in names:
                parent.remove(child)
        if parent.text and not parent.text.strip():
            parent.text = None
        for child in parent:
            child.tail = "\n"
