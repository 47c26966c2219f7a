"""The programs that a node starts and keeps running, and the files that they are started with."""
