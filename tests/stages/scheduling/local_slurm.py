"""A real Slurm on this machine, as this user: munge, a controller and two nodes that are folders and ports.

- no cgroups, no systemd, no accounts; everything lies in one folder with a short path (sockets allow 108 characters)
- the nodes are called 127.0.0.1 and 127.0.0.2: names that have an address everywhere
"""

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun", "scontrol", "scancel", "sinfo")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NODES = ("127.0.0.1", "127.0.0.2")  # in Slurm's short form 127.0.0.[1-2]
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge.socket
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MinJobAge=3600
KillWait=10
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# By default the scheduler looks once a minute.
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
# Nodes may claim more than the machine has.
SlurmdParameters=config_overrides
NodeName=127.0.0.[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=2 RealMemory=4000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurmError(Exception):
    """Slurm cannot be started here, and why."""


class LocalSlurm:
    """Its daemons, from `start` to `stop`; `environment` is what its commands need."""

    def __init__(self, settings=""):
        """`settings`: more lines of slurm.conf."""
        self._settings = settings
        self.base = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.base.chmod(0o755)  # munge wants others to reach its socket
        self.environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.base / "slurm.conf")}
        self._daemons = []

    def start(self):
        """Raises NoSlurmError, with everything stopped."""
        if missing := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
            shutil.rmtree(self.base)
            raise NoSlurmError(f"no {missing[0]}: apt-get install slurmctld slurmd slurm-client munge")
        try:
            self._configure()
            munge = [f"--{name}={self.base}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file")]
            munge += [f"--log-file={self.base}/munge.log", f"--seed-file={self.base}/munge.seed"]
            self._daemon("munged", "-F", *munge)
            self._until(lambda: (self.base / "munge.socket").is_socket(), "munged")
            # By absolute path, as slurmd starts itself anew from its own name.
            self._daemon("slurmctld", "-D", "-c")
            for node in NODES:
                (self.base / f"spool-{node}").mkdir()
                self._daemon("slurmd", "-D", "-N", node)
            self._until(lambda: self.run("sinfo", "-h", "-N", "-o", "%T").stdout.split() == ["idle"] * 2, "the nodes")
        except NoSlurmError:
            self.stop()
            raise

    def _configure(self):
        sockets = [socket.socket() for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname().split(".")[0]
        text = CONFIG.format(base=self.base, ports=ports, user=user, host=host)
        (self.base / "slurm.conf").write_text(f"{text}{self._settings}\n")
        # Named, the plugin does not look for cgroups, which containers lack.
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.base / "munge.key").write_bytes(secrets.token_bytes(1024))
        (self.base / "munge.key").chmod(0o600)
        (self.base / "state").mkdir()

    def _daemon(self, name, *words):
        with (self.base / f"{name}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [shutil.which(name, path=PATH), *words],
                    env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                )
            )  # fmt: skip

    def _until(self, ready, what):
        end = time.monotonic() + 30
        while not ready():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self._daemons):
                told = "".join(
                    path.read_text(errors="replace") for path in sorted(self.base.glob("*.out"))
                ).splitlines()
                lines = [line for line in told if "fatal" in line] or told[-1:]
                raise NoSlurmError(f"{what} did not start: {'; '.join(lines)}")
            time.sleep(0.1)

    def stop(self):
        """End all jobs, then the daemons, and remove the folder."""
        if len(self._daemons) > 1:
            self.run("scancel", "--quiet", f"--user={os.getuid()}")
            self.run("scancel", "--quiet", "--full", "--signal=KILL", f"--user={os.getuid()}")
            end = time.monotonic() + 15  # what a job started outlives the daemons otherwise
            while self.run("squeue", "-h", "-t", "R,CG").stdout.strip() and time.monotonic() < end:
                time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)
        shutil.rmtree(self.base, ignore_errors=True)

    def run(self, *words, **options):
        """A command of Slurm's, or one that calls them."""
        return subprocess.run(
            list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=120, **options
        )

    def jobs(self):
        """By number, of arrays `12_3`: state of every job there was."""
        lines = self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").stdout.splitlines()
        return dict(line.split() for line in lines)

    def wait(self, seconds=600):
        """Until no job is left in the queue; what was requeued need not wait for its time."""
        end = time.monotonic() + seconds
        while left := [key for key, state in self.jobs().items() if state not in OVER]:
            if time.monotonic() > end:
                raise TimeoutError(self.run("squeue", "-r").stdout)
            for key in left:
                if "Reason=BeginTime" in self.run("scontrol", "show", "job", key).stdout:
                    self.run("scontrol", "update", f"JobId={key}", "StartTime=now")
            time.sleep(0.3)
