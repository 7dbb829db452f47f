"""The base stack: what Portrait World's demo runs on, each part an object that the host knows."""
