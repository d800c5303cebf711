"""A spreadsheet of triplets and a folder of images, as the layout that `--dataset_name jsonl`
reads."""
