"""A cluster's programs as a node's children: the files that they are started with, how they are described, whether they answer."""
