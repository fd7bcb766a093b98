"""vlm-unlearn: removes harmful knowledge from vision-language models and proves it is gone."""
