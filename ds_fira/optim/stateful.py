"""The states of an optimizer: allocate them, save them with a description of what they hold, and load them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_fira.checkpoint.errors import errors_name
from ds_fira.checkpoint.named_state import KEY, SavedState, StateDict, TensorSlices, describe, described
from ds_fira.checkpoint.reconcile import Members, carry_values, refuse_changed_structure, saved_projection
from ds_fira.checkpoint.restore import refuse_other_states, restore
from ds_fira.checkpoint.slices import state_slices
from ds_fira.core.algorithms import FIRA_ADAM, Algorithm
from ds_fira.core.settings import GroupSettings, ParamGroup
from ds_fira.core.state import STEP, allocate, allocate_unprojected, host_key
from ds_fira.observe.scaling_recorder import ScalingRecorder
from ds_fira.optim.attachment import ALONE, Attachable
from ds_fira.optim.formed_states import formed_input, formed_state_dict, holds_whole
from ds_fira.optim.loading import load_as_saved
from ds_fira.optim.presets import PRESET, given_by_user, with_later_defaults
from ds_fira.optim.settings import warn_without_effect
from ds_fira.optim.state_shapes import refuse_adam, require_states
from ds_fira.sharding.geometry import ParamSlice, matrices_of
from ds_fira.sharding.local_matrices import LocalMatrices
from ds_fira.sharding.projection import PROJECT_FULL_RANK, is_projected
from ds_fira.sharding.refresher import Refresher

# Where the recorded scaling factors are in the description of a state dict.
RECORD = "scaling_factors"


def _form(given: ParamGroup) -> tuple[object, int]:
    """What the tensors of a state depend on beside the matrices, and `restore` can change."""
    return given["state_dtype"], GroupSettings.of(given).averages_of(2)


class Resumable(Attachable, Optimizer):
    """The part of an optimizer that owns its state, saves it and loads it.

    Attributes:
        algorithm: what it is.
        given: of every param group, the settings it was made with.
    """

    algorithm: Algorithm = FIRA_ADAM
    given: list[ParamGroup]
    recorder: ScalingRecorder | None
    _refresher: Refresher

    def _forget_attachment(self) -> None:
        self.attachment = ALONE
        self._bound: dict[Tensor, LocalMatrices] = {}
        self._alone: dict[Tensor, LocalMatrices] = {}

    def bind(self, param: Tensor, matrices: LocalMatrices) -> None:
        """Say which matrices lie in a flat parameter; called once the parameter is final, before its first step."""
        self._bound[param] = matrices

    def _matrices(self, param: Tensor) -> LocalMatrices:
        found = self._bound.get(param) or self._alone.get(param)
        if found is None:
            # All at once, so that numbers go by the order of the groups, whichever parameter has a gradient first.
            listed = [p for group in self.param_groups for p in group["params"] if self._projects(p, group)]
            first = 0
            for each in dict.fromkeys([*listed, param]):
                shards = tuple(matrices_of("", tuple(each.shape)))
                indices = tuple(range(first, first + len(shards)))
                first += len(shards)
                self._alone.setdefault(each, LocalMatrices(shards, indices, batched=each.ndim == 3, flat=False))
            found = self._alone[param]
        return found

    def forget_state_tensors(self, move: Callable[[Tensor], Tensor]) -> None:
        """Keep nothing of the tensors of states, which are others from now on, and move what was made from them."""
        self._refresher.forget_counts()
        for matrices in (*self._bound.values(), *self._alone.values()):
            matrices.move(move)

    def on_host(self, param: Tensor, key: str) -> bool:
        """Whether a state of a stepped tensor is the host's, wherever the tensor is; AdamW counts every step there."""
        projected = param in self._bound or param in self._alone
        return host_key(key) or (key == STEP and not projected)

    def _projects(self, param: Tensor, group: ParamGroup) -> bool:
        """Whether a stepped tensor has low-rank states. A flat partition has them where its matrices were bound."""
        return param in self._bound or is_projected(param.shape, group)

    def _state_of(self, param: Tensor, group: ParamGroup) -> dict[str, Tensor]:
        """The state of one parameter, allocated."""
        state = self.state[param]
        if not state:
            warn_without_effect(param, group, self.algorithm.name)
            state.update(self._allocated(param, group, param))
            self._show_names(param)
        return state

    def _allocated(self, param: Tensor, group: ParamGroup, like: Tensor) -> dict[str, Tensor]:
        """A new state of one parameter, in tensors of the device and dtype that suit `like`, of the same shape."""
        if self._projects(param, group):
            matrices, settings = self._matrices(param), GroupSettings.of(group)
            state = allocate(like, matrices.shapes, settings, matrices.batched, self.algorithm)
            if matrices.low_rank is not None:
                state.update(matrices.low_rank.allocate(like, settings, self.algorithm))
            return state
        return allocate_unprojected(like, group["state_dtype"], self.algorithm)

    def state_dict(self) -> StateDict:
        """As in `torch.optim`, with a description of what the tensors hold; tensors, numbers, strings, lists, dicts."""
        self.find_place()
        if self.attachment.form is not None:
            return formed_state_dict(self, super().state_dict)
        result = super().state_dict()
        slices = [self._slices(p, group) for group in self.param_groups for p in group["params"]]
        states = [result["state"].get(number, {}) for group in result["param_groups"] for number in group["params"]]
        result[KEY] = describe(self.attachment.digest, self.given, self._members(), slices, states, self.algorithm)
        if self.recorder is not None and not self.members:
            # Inside an engine it goes over ranks: `ds_fira.engine.deepspeed.save_load.client_state` saves it.
            result[KEY][RECORD] = self.recorder.state_dict()
        if not self.state:
            self._alone.clear()  # others may yet take the places of these parameters, whose memory it would hold
        return result

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict as in `torch.optim`, every state in the dtype it was saved in.

        `torch.optim.Optimizer` casts floating state to the parameter's dtype and moves counters to its device. Values
        of param groups are those saved, but for settings that this optimizer was given otherwise than the one that
        saved: these keep their new values, with a warning. Another `state_dtype` converts the states, and averages of
        a normalized residual that were not saved start anew.

        Raises:
            ValueError: the state was made with another rank, side or shape of a matrix, or for other ranks, or a part
                of it is missing; nothing is changed.
        """
        self.find_place()
        given, form = [dict(group) for group in self.param_groups], self.attachment.form
        with errors_name(self.algorithm.name):
            if form is not None:
                found = formed_input(self, state_dict)
                state_dict, saved, members, convert = found.state_dict, found.saved, found.members, False
            else:
                saved, members, convert = self.require_fit(state_dict)
        load_as_saved(self, super().load_state_dict, state_dict, states=form is None and not convert)
        if form is not None:
            form.load(state_dict)
        self._refresher.forget_counts()
        if self.recorder is not None and not self.members:
            self.recorder.load_state_dict(state_dict.get(KEY, {}).get(RECORD))
        if saved is not None:
            for group, own in zip(self.param_groups, given, strict=True):
                group.pop(PRESET, None)
                group.update(own)
            self.carry_groups(saved, members if form else [list(group.members.items()) for group in saved.groups])
        if convert:
            self.restore(saved, weights=False, members=members)
        if not self.state:
            self._alone.clear()

    def require_fit(self, state_dict: StateDict) -> tuple[SavedState | None, list[Members], bool]:
        """Check all that `load_state_dict` relies on, and change nothing.

        Returns:
            The saved states by name, where the state dict describes its tensors; the members of the groups now under
            the names that they had; whether states have to be converted to another form.

        Raises:
            ValueError: as of `load_state_dict`, without the optimizer's name.
        """
        counts = [len(group["params"]) for group in state_dict["param_groups"]]
        own = [len(group["params"]) for group in self.param_groups]
        members, plain = self._members(), described(state_dict) if KEY in state_dict else None
        if plain is None and any(self._projects(p, group) for group in self.param_groups for p in group["params"]):
            refuse_adam(state_dict)
        if counts != own and (plain is None or plain["layout"] == self.attachment.digest):
            raise ValueError(
                f"the state dict has param groups of {counts} tensors, and the optimizer of {own}; build the same "
                "groups as the run that saved, and where that gave its parameters in a flat list, pass the model, as "
                f"in {self.algorithm.name}(model, rank=...)."
            )
        if plain is None:
            require_states(state_dict, self.param_groups, self._allocated)
            return None, members, False
        saved = SavedState()
        saved.add(state_dict)
        listed = [[(name, tuple(shape)) for name, shape in group] for group in plain["members"]]
        if len(listed) == len(members):
            # By position, as torch does: alone, names are only positions.
            members = self._renamed(listed)
            refuse_changed_structure(saved.groups, self.param_groups, members)
        refuse_other_states(saved, self.algorithm)
        if plain["layout"] != self.attachment.digest and not holds_whole(self):
            raise ValueError(
                "this state dict is a rank's share of a run on other ranks, or with other settings; load it "
                "through DeepSpeed's engine.load_checkpoint, which brings it to where it belongs."
            )
        groups = self._grouped_as(saved, members)
        slices = [self._slices(param, group, members).to_plain() for group in groups for param in group["params"]]
        if slices != plain["places"]:
            raise ValueError("this state dict is another rank's share of the run; load each rank's own.")
        convert = any(
            _form(group) != _form(before.given) for group, before in zip(self.given, saved.groups, strict=False)
        )
        if not convert:
            require_states(state_dict, groups, self._allocated)
        return saved, members, convert

    def _grouped_as(self, saved: SavedState, members: list[Members]) -> list[ParamGroup]:
        """The param groups as they will be: what had low-rank states at full rank when it was saved, keeps them."""
        found = []
        for group, listed in zip(self.param_groups, members, strict=True):
            wanted = saved_projection(saved.groups, group, listed)
            found.append(group if wanted is None else {**group, PROJECT_FULL_RANK: wanted})
        return found

    def restore(
        self, saved: SavedState, *, weights: bool, members: list[Members] | None = None, rehearsal: bool = False
    ) -> None:
        """Copy the states that the ranks of a run saved, as many as they were; their structure has been checked.

        Args:
            saved: read from the state dicts of all its ranks.
            weights: whether the weights of the stepped tensors are copied too.
            members: of every param group, the names by which `saved` knows its parameters; None for its own.
            rehearsal: read all of it, and change nothing: what is filled has no memory.

        Raises:
            ValueError: a part of it is missing.
        """
        owners = {param: group for group in self.param_groups for param in group["params"]}
        filled = {torch.empty_like(param, device="meta") if rehearsal else param: param for param in owners}
        if not rehearsal:
            self.state.clear()
            self._refresher.forget_counts()
        slices = [(target, self._slices(param, owners[param], members)) for target, param in filled.items()]

        def state_of(target: Tensor) -> dict[str, Tensor]:
            param = filled[target]
            return self._allocated(param, owners[param], target) if rehearsal else self._state_of(param, owners[param])

        with errors_name(self.algorithm.name):
            restore(saved, slices, state_of, weights=weights, algorithm=self.algorithm)

    def carry_groups(self, saved: SavedState, members: list[Members] | None = None) -> None:
        """Give the param groups the values they had, and say which settings keep a new value instead."""
        members = members or self._members()
        groups = list(map(with_later_defaults, saved.groups))
        before = {name: group.values for group in groups for name in group.members}
        marks = [{PRESET: group[PRESET]} if PRESET in group else {} for group in self.param_groups]
        given = given_by_user(self.param_groups, self.given, members, before)
        notes = carry_values(groups, self.param_groups, members, given)
        for group, mark in zip(self.param_groups, marks, strict=True):
            group.pop(PRESET, None)
            group.update(mark)  # what a preset gives is this run's own
        if notes and (self.communicator is None or self.communicator.dp_rank == 0):
            warnings.warn(
                f"{self.algorithm.name}: the resumed run has other settings: {'; '.join(notes)}.", stacklevel=3
            )

    def _members(self) -> list[Members]:
        """By group, names and shapes of its parameters; alone without names, their numbers in the state dict."""
        if self.members:
            return self.members
        found: list[Members] = []
        for group in self.param_groups:
            first = sum(len(listed) for listed in found)
            names = group.get("param_names") or [str(first + i) for i in range(len(group["params"]))]
            found.append([(name, tuple(p.shape)) for name, p in zip(names, group["params"], strict=True)])
        return found

    def _renamed(self, members: list[Members]) -> list[Members]:
        """Own members under the names of saved ones, position by position."""
        return [
            [(theirs[0], mine[1]) for theirs, mine in zip(saved, own, strict=False)] + list(own[len(saved) :])
            for saved, own in zip(members, self._members(), strict=True)
        ]

    def _slices(self, param: Tensor, group: ParamGroup, members: list[Members] | None = None) -> TensorSlices:
        """What a stepped tensor holds."""
        params = self.attachment.slices.get(param)
        if params is None:
            # Alone the names are found by position.
            listed = zip(self.param_groups, members or self._members(), strict=True)
            names = {id(p): name for g, named in listed for p, (name, _) in zip(g["params"], named, strict=True)}
            params = (ParamSlice(names[id(param)], 0, 0, param.numel()),)
        if not self._projects(param, group):
            return TensorSlices(params, ())
        # The matrices of a lone parameter do not know its name.
        matrices = self._matrices(param)
        prefix = "" if matrices.flat else params[0].name
        return TensorSlices(params, tuple(state_slices(matrices, GroupSettings.of(group), prefix)))
