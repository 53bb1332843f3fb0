"""A cluster's job server as one client that never waits for ever, and the jobs that it remembers."""

import logging
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster.connection import check_address, split_address
from conf.errors import ConfigError, ResourceError
from conf.rules import nearest

ANSWER_SEC = 30.0  # for one answer; the server may be busy with another's upload
LOUD = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")


class JobClient(JobSubmissionClient):
    """Ray's client, whose requests end: it waits for an answer as long as the server is silent, which may be always."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        try:
            answer = super()._do_request(method, endpoint, **{"timeout": ANSWER_SEC, **options})
        except requests.RequestException as error:
            silent = f"is silent for {ANSWER_SEC:g} s" if isinstance(error, requests.Timeout) else "does not answer"
            raise self._error(f"the job server there {silent}") from error
        except AuthenticationError as error:
            reason = str(error).strip().splitlines()[0]
            fix = "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as the head has them"
            raise ResourceError("cluster.address", self.get_address(), reason[:300], fix) from error
        if answer.status_code >= requests.codes.internal_server_error:
            reason = next(iter(answer.text.strip().splitlines()[-1:]), "no reason given")
            raise self._error(f"the job server there failed ({answer.status_code}): {reason[:300]}")
        return answer

    def _error(self, rule: str) -> ResourceError:
        fix = "try again, or look after its head node; what a job wrote is in its run folder, and the same command "
        return ResourceError("cluster.address", self.get_address(), rule, fix + "goes on from there")


def connect_jobs(address: str) -> JobClient:
    """A client of the job server at ``address`` (http://HOST:PORT, or a cluster address).

    Raises:
        ResourceError: nothing answers there, or not to this client.
    """
    for name in LOUD:  # which files are uploaded, which sockets close
        logging.getLogger(name).setLevel(logging.ERROR)
    if not address.startswith(("http://", "https://")):
        check_address(address)
    else:
        split_address(address)
    try:
        return JobClient(address)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ResourceError(
            "cluster.address",
            address,
            f"no Ray job server answers there: {reason[0][:300] if reason else error!r}",
            "http://HOST:8265 of a running head (`ray start --head`), or no address for a local one",
        ) from error


def list_jobs(client: JobSubmissionClient) -> list[JobDetails]:
    """The submitted jobs that the server remembers, newest first."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda j: -(j.start_time or 0))


def find_job(jobs: list[JobDetails], job: str) -> JobDetails:
    """The job whose id is, or uniquely starts with or ends with, ``job``.

    Raises:
        ConfigError: there is none, or several.
    """
    names = [details.submission_id or "" for details in jobs]
    found = [
        d for d, name in zip(jobs, names, strict=True) if name == job or name.startswith(job) or name.endswith(job)
    ]
    if len(found) != 1:
        rule = "names one submitted job" if found else "is the id of a submitted job"
        raise ConfigError("job", job, rule, nearest(job, names) or "`sundog list` shows the jobs")
    return found[0]
