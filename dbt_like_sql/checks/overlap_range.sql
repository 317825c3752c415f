-- of: overlap
-- Nobody shares more than was chosen, and the overlap lies in [0, 1].
select task, generation, budget, seed, strategy, other, chosen, other_chosen, shared, jaccard
from overlap
where shared > least(chosen, other_chosen) or jaccard not between 0 and 1
