"""Makes WebDataset shards of people from folders of photos; see build.py."""
