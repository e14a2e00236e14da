"""Nodes that come and go: the session on this machine, its provider, the spot market, the doctor."""
