"""dsel: decide which examples to finetune on, keep the decision current, show what it bought."""
