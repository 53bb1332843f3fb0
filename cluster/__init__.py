"""Orchestration on Ray: connection, data stages, gangs of ranks and their supervision, jobs, serving."""

from cluster.environment import prepare

prepare()
