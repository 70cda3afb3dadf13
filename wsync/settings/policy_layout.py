"""The layout of the spec's policy: when it is read, and what is remembered of it.

Reading it starts a process that runs the user's code and imports torch, which takes seconds: a trainer that keeps one
checkpoint may have replaced it by then. So it is read before a checkpoint is opened, and not again while the policy's
file stays as it is.
"""

from __future__ import annotations

import json

from ..errors import LayoutDiffers
from ..layout.layout import Layout
from ..segment.publication import Publication
from ..segment.segment import Segment
from . import layout_process
from .spec import Spec


class PolicyLayout:
    """What one syncer knows about its policy's layout.

    Attributes:
        reads: how often it was read, each time in a process of its own.
    """

    def __init__(self, spec: Spec) -> None:
        self.reads = 0
        self._spec = spec
        self._layout: Layout | None = None
        self._of = ""  # fingerprint of its policy; empty if it must be read again
        self._is_fresh = False

    def begin_pass(self) -> None:
        """Allows ``recheck`` to read again."""
        self._is_fresh = False

    def read(self) -> Layout:
        """The policy's layout.

        Raises:
            SpecError: the policy cannot be imported or built.
        """
        of = self._spec.fingerprint()
        if self._layout is None or self._of != of:
            self.reads += 1
            self._layout, self._of, self._is_fresh = layout_process.layout_of_spec(self._spec), of, True
        return self._layout

    def for_new_segment(self) -> Layout:
        """The layout for a segment that is made, after which it is read again.

        The fingerprint covers the policy's own file, not the modules that it imports.
        """
        layout = self.read()
        self._of = ""
        return layout

    def check(self, segment: Segment, live: Publication | None) -> None:
        """Checks that the policy has the layout of its segment, unless that was made for this very policy.

        Args:
            live: what is live in the segment.

        Raises:
            LayoutDiffers: it does not.
            SpecError: the policy cannot be imported or built.
        """
        if self._spec.fingerprint() not in (segment.spec, live.spec if live else ""):
            self.compare(segment, self.read())

    def recheck(self, segment: Segment) -> None:
        """The same after a checkpoint did not fit.

        Reads the layout again, once a pass: the policy's architecture may have changed in a module that it imports.
        """
        if self._layout is None or not self._is_fresh:
            self._of = ""
            self._layout = self.read()
        self.compare(segment, self._layout)

    def compare(self, segment: Segment, layout: Layout) -> None:
        """Compares the layout that was read with the segment's, and does not remember a difference."""
        if layout.names_in(segment.layout) is not None:
            return
        self._of = ""
        differences = segment.layout.differences(layout)
        advice = layout.advice(segment.layout) or (
            f"Stop its processes and `wsync rm {segment.name}`, or give the new policy another --name."
        )
        own = self._spec.weights.own
        if own and segment.layout.without(own).digest == layout.digest:
            advice += f" Its readers attach with exclude={json.dumps(own)}, as weights.own has it."
        raise LayoutDiffers(
            f"segment {segment.name!r} was made for another architecture than {self._spec.policy} has now: "
            f"{len(differences)} tensors differ. {advice}",
            differences,
        )
