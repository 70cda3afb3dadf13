"""Whether a segment has the layout of the spec's policy.

Reading that layout starts a process that runs the user's code and imports torch, which takes seconds.
"""

from __future__ import annotations

from ..errors import LayoutDiffers
from ..layout.layout import Layout
from ..segment.files import Publication
from ..segment.segment import Segment
from ..settings import layout_process
from ..settings.spec import Spec


def is_known(spec: Spec, segment: Segment, live: Publication | None) -> bool:
    """Whether the segment, or what is live in it, was made for this very policy, so that its layout fits."""
    return spec.fingerprint in (segment.spec, live.spec if live else "")


def check_layout(spec: Spec, segment: Segment, layout: Layout | None = None) -> None:
    """Checks that the policy still has the layout that its segment was made for.

    Args:
        layout: the policy's, if it was read already.

    Raises:
        LayoutDiffers: it does not.
        SpecError: the policy cannot be imported or built.
    """
    layout = layout or layout_process.layout_of_spec(spec)
    if layout.digest != segment.layout.digest:
        differences = segment.layout.differences(layout)
        raise LayoutDiffers(
            f"segment {segment.name!r} was made for another architecture than {spec.policy} has now: "
            f"{len(differences)} tensors differ. Stop its processes and `wsync rm {segment.name}`, or give the new "
            "policy another --name.",
            differences,
        )
