"""The part that analyses share which keep one state for each kind of attention: `self`, `encoder` and `cross`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, Self, TypeVar

from torch import Tensor

from attnlab.capture.call import Kind
from attnlab.runs.analysis import Analysis, Layout


class KindState(Protocol):
    """What an analysis has gathered of one kind of attention."""

    def seen(self) -> bool:
        """Whether any sequence has come."""

    def merge(self, other: Self) -> None:
        """Adds the state of the data that follows."""

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state that `state_dict` gave."""


State = TypeVar("State", bound=KindState)


class AnalysisByKind(Analysis, Generic[State]):
    """An analysis whose state is one `KindState` for each kind that the model has."""

    def __init__(self, layout: Layout, kinds: dict[Kind, State]) -> None:
        super().__init__(layout)
        self._kinds = kinds

    def seen_kinds(self) -> list[State]:
        """The states of the kinds of which anything was seen."""
        return [state for state in self._kinds.values() if state.seen()]

    def merge(self, other: Self) -> None:
        """Adds the state of the data that follows."""
        for kind, state in self._kinds.items():
            state.merge(other._kinds[kind])

    def state_dict(self) -> dict[str, Tensor]:
        """The states of all kinds, every name beginning with its kind."""
        return {f"{kind}.{name}": t for kind, state in self._kinds.items() for name, t in state.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state that `state_dict` gave."""
        for kind, own in self._kinds.items():
            own.load_state_dict(
                {name.removeprefix(f"{kind}."): t for name, t in state.items() if name.startswith(f"{kind}.")}
            )
