"""vlm-unlearn: unlearns harmful knowledge in vision-language models, and measures how well it worked."""
