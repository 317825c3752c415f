"""What each strategy is, in one table: to be known without loading it, or torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto


class Needs(Flag):
    """What a strategy reads beside the ids of the pool."""

    NOTHING = 0
    SKETCHES = auto()
    TARGET = auto()
    LABELS = auto()
    MODEL = auto()


SKETCHES = Needs.SKETCHES | Needs.LABELS
TO_TARGET = SKETCHES | Needs.TARGET
EVERY_PICK, EVERY_PAIR = (1, 1), (2, 0)


@dataclass(frozen=True)
class Strategy:
    """Traits of a strategy.

    where          module in `selection`, and class
    version        of its code: a higher one makes its earlier selections stale
    needs          what it reads
    nested         is a smaller budget a prefix of a larger one?
    deterministic  does the seed change nothing?
    whole          does the budget change nothing?
    warms          is a re-selection better off going on from the last one?
    follows        does that look only at what was chosen and what has come since?
    aim            what its objective is called; "" where it has none
    lower          is a smaller objective better?
    grows          powers of the pool's and the budget's size with which its time grows
    """

    name: str
    where: str
    version: int = 1
    needs: Needs = Needs.NOTHING
    nested: bool = True
    deterministic: bool = False
    whole: bool = False
    warms: bool = False
    follows: bool = False
    aim: str = ""
    lower: bool = False
    grows: tuple[int, int] = (1, 0)

    def work(self, rows: int, n: int) -> float:
        """How its time grows with the pool and the budget, up to a factor."""
        return float(rows) ** self.grows[0] * float(n) ** self.grows[1]


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("random", "baselines:Random"),
        Strategy("full", "baselines:Full", nested=False, deterministic=True, whole=True),
        Strategy("target_only", "baselines:TargetOnly", deterministic=True, whole=True),
        Strategy(
            "skmm", "skmm:Skmm", 3, SKETCHES, nested=False, warms=True, follows=True,
            aim="trace_score", lower=True, grows=EVERY_PICK,
        ),
        Strategy(
            "bads", "bads:Bads", 2, Needs.TARGET | Needs.LABELS | Needs.MODEL, warms=True,
            aim="weight_at_the_end",
        ),
        Strategy(
            "bads_joint", "bads:BadsJoint", 2, Needs.TARGET | Needs.LABELS | Needs.MODEL,
            warms=True, whole=True,
        ),
        Strategy(
            "smallloss", "smallloss:SmallLoss",
            needs=Needs.TARGET | Needs.LABELS | Needs.MODEL,
        ),
        Strategy("cleanlab", "confident:Confident", needs=Needs.LABELS | Needs.MODEL),
        Strategy(
            "itl", "itl:Itl", 3, TO_TARGET, deterministic=True, warms=True, follows=True,
            aim="information_nats", grows=EVERY_PICK,
        ),
        Strategy(
            "gradmatch", "gradmatch:Gradmatch", 2, TO_TARGET, deterministic=True, warms=True,
            follows=True,
        ),
        Strategy("kcenter", "geometry:KCenter", needs=SKETCHES, grows=EVERY_PICK),
        Strategy(
            "herding", "geometry:Herding", needs=SKETCHES, deterministic=True, grows=EVERY_PICK
        ),
        Strategy("adaptive", "geometry:Adaptive", needs=SKETCHES, grows=EVERY_PICK),
        Strategy("leverage", "geometry:Leverage", needs=SKETCHES),
        Strategy("cosine", "similarity:Cosine", needs=TO_TARGET, deterministic=True),
        Strategy(
            "information_density", "similarity:InformationDensity",
            needs=TO_TARGET | Needs.MODEL, deterministic=True,
        ),
        Strategy("entropy", "uncertainty:Entropy", needs=Needs.MODEL, deterministic=True),
        Strategy("margin", "uncertainty:Margin", needs=Needs.MODEL, deterministic=True),
        Strategy(
            "least_confidence", "uncertainty:LeastConfidence", needs=Needs.MODEL,
            deterministic=True,
        ),
        Strategy("kmeanspp", "diversity:KMeansPlusPlus", needs=SKETCHES, grows=EVERY_PICK),
        Strategy("badge", "diversity:Badge", needs=Needs.MODEL, grows=EVERY_PICK),
        Strategy(
            "typiclust", "diversity:TypiClust", needs=SKETCHES, nested=False, grows=EVERY_PICK
        ),
        Strategy(
            "probcover", "diversity:ProbCover", needs=SKETCHES, deterministic=True,
            grows=EVERY_PAIR,
        ),
        Strategy(
            "facility", "diversity:Facility", needs=SKETCHES, deterministic=True, grows=EVERY_PAIR
        ),
        Strategy(
            "facility_target", "diversity:FacilityTarget", needs=TO_TARGET, deterministic=True,
            grows=EVERY_PAIR,
        ),
    )
}  # fmt: skip
