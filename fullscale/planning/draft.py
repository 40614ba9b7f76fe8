"""The parameters of a plan that is being made, each with its reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fullscale.params import Params


@dataclass(frozen=True)
class Proposal:
    """A parameter of the plan.

    Attributes:
        key: as in docs/reference.md.
        before: the value in params.yaml.
        value: the value of the plan.
        reason: in a few words.
    """

    key: str
    before: Any
    value: Any
    reason: str

    @property
    def is_change(self) -> bool:
        """True if params.yaml has another value."""
        return bool(self.before != self.value)


@dataclass
class Draft:
    """The parameters of a plan that is being made.

    Attributes:
        params: of params.yaml.
        mine: keys that the user decides; they keep their values.
        proposals: so far.
    """

    params: Params
    mine: Collection[str]
    proposals: list[Proposal] = field(default_factory=list)

    def propose(self, key: str, value: Any, reason: str) -> None:
        """Take a value and its reason."""
        before = get_value(self.params, key)
        if key in self.mine:
            value, reason = before, "yours"
        self.proposals.append(Proposal(key, before, value, reason))

    def fixed(self, key: str) -> Any:
        """Return the user's value of a key; None if the plan may choose it."""
        return get_value(self.params, key) if key in self.mine else None

    def planned(self) -> Params:
        """Return the parameters with all values so far."""
        return with_values(self.params, {each.key: each.value for each in self.proposals})


def get_value(params: Params, key: str) -> Any:
    """Return the value of a key, such as train.width, as YAML has it."""
    value: Any = params.model_dump(mode="json", by_alias=True)
    for part in key.split("."):
        value = value[part]
    return value


def with_values(params: Params, values: Mapping[str, Any]) -> Params:
    """Return parameters with some values changed, and check all of them again.

    Raises:
        ValidationError: a value breaks a rule.
    """
    content = params.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        *path, name = key.split(".")
        section = content
        for part in path:
            section = section[part]
        section[name] = value
    return Params.model_validate(content)
