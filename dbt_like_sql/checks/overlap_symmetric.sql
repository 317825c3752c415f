-- of: overlap
-- The overlap of a with b is that of b with a.
select a.task, a.generation, a.budget, a.seed, a.strategy, a.other, a.jaccard
from overlap as a
anti join overlap as b
    on b.task = a.task and b.generation = a.generation and b.budget = a.budget and b.seed = a.seed
    and b.strategy = a.other and b.other = a.strategy
    and b.shared = a.shared and b.jaccard is not distinct from a.jaccard
