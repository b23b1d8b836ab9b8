"""Networks: the small vision-language-action policy, its critics, normalisation; nothing about training."""
