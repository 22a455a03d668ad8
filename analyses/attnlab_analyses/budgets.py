"""Key budgets: how much of each head's attention heavy hitters keep, and whether layers look at the same keys.

Every sequence is read as a prompt and its last 32 queries. At the end of the prompt a policy keeps a share of its keys
(`key_policies`: H2O, SnapKV, and beside them first and recent keys, hindsight and chance). `h2o_kept_10` is the mean
over those queries of their attention on the 10 % that H2O keeps and on the keys that came after the prompt, which every
policy has. What this does to the loss is the experiment `key_budget_loss`.

TidalDecode (arXiv 2410.05076) and DELTA choose keys in one layer and use them in the next ones. The
array `overlap` says how far that would do: |I_l and I_m| / k, where I_l are the k keys to which the heads of layer l
together attend most, for each of the last queries by itself. Two random choices overlap by k over the visible keys.

Only column sums and 64 rows of each head are read.

Shapes: L layers, H heads, b sequences of one length n, R last queries, k keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import pandas as pd
import plotly.graph_objects as go
import torch
from attnlab_kernels import Emit
from jaxtyping import Float
from torch import Tensor

from attnlab.capture.call import Call, Site
from attnlab.errors import AttnlabError
from attnlab.options import check_whole
from attnlab.results import Metric, NamedArray, Result, heads_frame
from attnlab.runs.analysis import Analysis, Batch, Layout, Needs
from attnlab_analyses.budgets_figures import budget_figures
from attnlab_analyses.key_policies import OBSERVED, POLICIES, WORDS, Policy, Scores, kept_keys, keys_of
from attnlab_analyses.last_rows import Group, chosen_rows, groups_of, reads_itself
from attnlab_analyses.moments import HeadMoments
from attnlab_analyses.rows import float64
from attnlab_analyses.sentences import heads_named

BUDGETS = (0.05, 0.1, 0.2, 0.5)
LATER = 32
TOP_KEYS = 64
SHORTEST = 16
"""Tokens of a sequence below which nothing is read."""
_MAPPED: tuple[Policy, ...] = ("h2o", "snapkv")
"""Policies of which each head has a metric at each budget."""


class Budgets(Analysis):
    """What share of the attention each policy keeps at each budget, and the overlap of layers' strongest keys.

    Args:
        layout: of the model's heads.
        budgets: shares of the prompt's keys.
        later: queries after the prompt, a quarter of the sequence at most.
        top_keys: k of the overlap, an eighth of the sequence at most.
    """

    name: ClassVar[str] = "budgets"
    summary: ClassVar[str] = "key budgets: attention that H2O and SnapKV keep, overlap of layers' strongest keys"

    def __init__(
        self, layout: Layout, budgets: Sequence[float] = BUDGETS, later: int = LATER, top_keys: int = TOP_KEYS
    ) -> None:
        super().__init__(layout)
        self.budgets = checked_budgets(budgets)
        for name, value in (("later", later), ("top_keys", top_keys)):
            check_whole(name, value, 1)
        self.later, self.top_keys = later, top_keys
        self._heads = layout.heads.get("self", ())
        self._kept = {(p, b): HeadMoments(self._heads) for p in POLICIES for b in self.budgets}
        layers = len(self._heads)
        self._overlap = torch.zeros(layers, layers, dtype=torch.float64)
        self._shared = torch.zeros(layers, layers, dtype=torch.float64)
        self._chance = torch.zeros(layers, layers, dtype=torch.float64)
        self._lengths = torch.zeros(3, dtype=torch.float64)  # sequences, prompt tokens, k
        self._top: dict[int, list[Tensor]] = {}
        self._visible: dict[int, list[Tensor]] = {}
        self._asked: tuple[Batch, int, list[Group], Emit] | None = None

    @classmethod
    def refusal(cls, layout: Layout) -> str | None:
        """Keys are kept for causal self-attention."""
        return None if "self" in layout.heads else "it has no self-attention, whose keys are kept."

    def _later(self, length: int) -> int:
        return min(self.later, length // 4)

    def needs(self, site: Site, batch: Batch) -> Needs | None:
        """Column sums and the last rows; nothing where attention is not causal."""
        if not reads_itself(site) or batch.own:
            return None
        return Needs(self._question(site, batch)[3])

    def _question(self, site: Site, batch: Batch) -> tuple[Batch, int, list[Group], Emit]:
        """Groups of sequences that are long enough, and their rows; layer after layer shares them."""
        known = self._asked
        if known is None or known[0] is not batch or known[1] != site.n_queries:
            groups = [group for group in groups_of(site) if group.length >= SHORTEST]
            rows = chosen_rows(groups, self._rows, site.batch, site.device)
            known = self._asked = (batch, site.n_queries, groups, Emit(key_sum=True, rows=rows))
        return known

    def _rows(self, length: int) -> range:
        """The observed queries and those after the prompt."""
        return range(max(0, length - self._later(length) - OBSERVED), length)

    def update(self, call: Call, batch: Batch) -> None:
        """Takes in what the policies keep of one layer, and its strongest keys."""
        emitted, layer = call.emitted, call.layer
        assert emitted.rows is not None
        assert emitted.key_sum is not None
        groups = self._question(call.site, batch)[2]
        shape = (len(POLICIES), len(self.budgets), call.site.batch, call.site.n_heads)
        values = torch.full(shape, torch.nan, dtype=torch.float64)
        self._top[layer], self._visible[layer] = [], []
        for group in groups:
            number, members = self._later(group.length), list(group.members)
            prompt = group.length - number
            rows = float64(group.of(emitted.rows)[:, :, : len(self._rows(group.length))])
            after = rows[:, :, -number:]
            sums = float64(group.of(emitted.key_sum))[..., :prompt]
            accumulated = sums - after[..., :prompt].sum(2)
            later = (after / after.sum(-1, keepdim=True).clamp(min=1e-300)).mean(2)
            scores = Scores(accumulated, rows[:, :, :-number, :prompt].sum(2), later[..., :prompt])
            own = later[..., prompt:].sum(-1)
            for b, budget in enumerate(self.budgets):
                keys = keys_of(budget, prompt)
                for p, policy in enumerate(POLICIES):
                    if policy == "random":
                        on_prompt = scores.later.sum(-1) * keys / prompt  # its mean over all choices
                    else:
                        on_prompt = torch.where(kept_keys(policy, scores, keys), scores.later, 0).sum(-1)
                    values[p, b, members] = (on_prompt + own).cpu()
            k = min(self.top_keys, max(1, group.length // 8))
            self._top[layer].append(after.sum(1).topk(k, -1).indices)
            visible = torch.arange(prompt, group.length) + 1.0
            self._visible[layer].append(visible.clamp(max=call.site.window or group.length))
            if layer == 0:
                self._lengths += torch.tensor([1.0, prompt, k], dtype=torch.float64) * len(members)
        for p, policy in enumerate(POLICIES):
            for b, budget in enumerate(self.budgets):
                self._kept[policy, budget].add(layer, values[p, b])
        self.record(
            call,
            batch,
            {metric_of(m, b): values[POLICIES.index(m), i] for m in _MAPPED for i, b in enumerate(self.budgets)},
        )

    def end_batch(self, batch: Batch, loss: Float[Tensor, "B positions"] | None) -> None:
        """Compares the layers' strongest keys."""
        for layer, groups in self._top.items():
            for g, keys in enumerate(groups):
                chosen = torch.zeros(*keys.shape[:2], int(self._widest(g)) + 1, dtype=torch.bool, device=keys.device)
                chosen.scatter_(-1, keys, True)
                for other, several in self._top.items():
                    shared = chosen.gather(-1, several[g]).double().mean((1, 2))
                    self._overlap[layer, other] += shared.sum().cpu()
                    self._shared[layer, other] += len(shared)
                    # Of a random choice among fewer keys, so many are in one among more of them.
                    visible = torch.maximum(self._visible[layer][g], self._visible[other][g])
                    self._chance[layer, other] += (keys.shape[-1] / visible).clamp(max=1).mean() * len(shared)
        self._top, self._visible = {}, {}

    def _widest(self, group: int) -> Tensor:
        return torch.stack([several[group].max() for several in self._top.values()]).max()

    def merge(self, other: Self) -> None:
        """Adds the state of the data that follows."""
        for key, moments in self._kept.items():
            moments.merge(other._kept[key])
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors."""
        state = {name.strip("_"): getattr(self, name) for name in _SUMS}
        for (policy, budget), moments in self._kept.items():
            state |= moments.state_dict(metric_of(policy, budget))
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state that `state_dict` gave."""
        for name in _SUMS:
            setattr(self, name, state[name.strip("_")].clone())
        for (policy, budget), moments in self._kept.items():
            moments.load_state_dict(state, metric_of(policy, budget))

    def result(self) -> Result:
        """What H2O and SnapKV keep by head, a row for every policy and budget, and the overlap of layers."""
        if not float(self._lengths[0]):
            nothing = (f"No causal self-attention of {SHORTEST} tokens or more was read, whose keys could be kept.",)
            return Result(self.name, nothing, heads_frame([]), pd.DataFrame(), {})
        rows = [
            (layer, head, "self", metric_of(m, b), float(kept.mean[layer, head]), float(kept.stderr()[layer, head]), n)
            for m in _MAPPED
            for b in self.budgets
            for kept in (self._kept[m, b],)
            for layer, head in heads_named(self._heads)
            if (n := int(kept.count[layer, head]))
        ]
        return Result(
            self.name, tuple(self._findings()), heads_frame(rows), self._table(), self._arrays(),
            metrics={metric_of(m, b): _metric(m, b) for m in _MAPPED for b in self.budgets},
        )  # fmt: skip

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """What the policies keep at each budget, maps of heads, and the overlap of layers."""
        return budget_figures(result)

    def _table(self) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "policy": policy,
                "budget": budget,
                "kept": float(kept.mean[kept.count > 0].mean()),
                "lowest": float(kept.mean[kept.count > 0].min()),
                "prompt": float(self._lengths[1] / self._lengths[0]),
            }
            for (policy, budget), kept in self._kept.items()
        )

    def _arrays(self) -> dict[str, NamedArray]:
        overlap = torch.where(self._shared > 0, self._overlap / self._shared.clamp(min=1), torch.nan)
        several = [torch.stack([self._masked(p, b) for b in self.budgets]) for p in POLICIES]
        return {
            "overlap": NamedArray(
                overlap.numpy(), ("layer", "other layer"), {}, "", "Share of the strongest keys that two layers share."
            ),
            "kept": NamedArray(
                torch.stack(several).numpy(),
                ("policy", "budget", "layer", "head"),
                {"policy": list(POLICIES), "budget": list(self.budgets)},
                "attention",
                "Attention of the last queries on the keys that a policy keeps.",
            ),
        }

    def _masked(self, policy: Policy, budget: float) -> Tensor:
        kept = self._kept[policy, budget]
        return torch.where(kept.count > 0, kept.mean, torch.nan)

    def _findings(self) -> list[str]:
        table = self._table()
        prompt, k = (self._lengths[1:] / self._lengths[0]).tolist()
        found = []
        budget = min(self.budgets, key=lambda b: abs(b - 0.1))
        at = table[table["budget"] == budget].set_index("policy")
        shares = {policy: float(at["kept"][policy]) for policy in POLICIES}
        others = ", ".join(f"{WORDS[policy]} {shares[policy]:.1%}" for policy in POLICIES[1:])
        found.append(
            f"With {budget:.3g} of the keys of a prompt ({prompt:,.0f} tokens on average), H2O keeps "
            f"{shares['h2o']:.1%} of the last queries' attention, {others}; mean over heads."
        )
        kept = self._masked("h2o", budget)
        names = heads_named(self._heads)
        worst = min(
            ((float(kept[place]), name) for place, name in names.items() if not kept[place].isnan()), default=None
        )
        if worst is not None:
            found.append(f"H2O keeps least of {worst[1]}: {worst[0]:.1%}.")
        if len(self._heads) > 1:
            overlap, chance = (
                float((sums / self._shared.clamp(min=1)).diagonal(1).mean()) for sums in (self._overlap, self._chance)
            )
            found.append(
                f"Neighbouring layers share {overlap:.1%} of their {k:.3g} strongest keys on average; by chance it "
                f"would be {chance:.1%}."
            )
        return found


_SUMS = ("_overlap", "_shared", "_chance", "_lengths")


def metric_of(policy: str, budget: float) -> str:
    """The name of a metric.

    >>> metric_of("h2o", 0.05)
    'h2o_kept_5'
    """
    return f"{policy}_kept_{100 * budget:g}"


def _metric(policy: Policy, budget: float) -> Metric:
    title = f"Kept by {WORDS[policy]} at {100 * budget:g} %"
    return Metric(title, "", "the last queries' weight on the keys that it keeps", 0.0, 1.0)


def checked_budgets(budgets: object) -> tuple[float, ...]:
    """The budgets in rising order.

    Raises:
        AttnlabError: one is no share above 0 and up to 1, or there is none.
    """
    given = list(budgets) if isinstance(budgets, Sequence) and not isinstance(budgets, str) else []
    good = [b for b in given if isinstance(b, int | float) and not isinstance(b, bool) and 0 < b <= 1]
    if not given or len(good) != len(given):
        raise AttnlabError(f"The budgets are shares of the keys, each above 0 and up to 1; got {budgets!r}.")
    return tuple(sorted({float(b) for b in good}))
