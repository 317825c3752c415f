-- of: caught
-- Shares lie in [0, 1], and no more copies stand beside their original than there are copies.
select *
from caught
where flipped not between 0 and 1 or off_task not between 0 and 1
    or near_duplicate not between 0 and 1 or repeated > near_duplicate + 1e-9
