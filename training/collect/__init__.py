"""From folders of photos to shards of people; see run.py."""
