"""`mirrorpair demo`: a whole pair on this machine, real processes and real kills, and a verdict.

    processes.py  alpha, beta and the witness: their folder, their start, their end by pid
    journal.py    what was written through NBD, and what every block may therefore hold
    writer.py     the clients: several connections, several requests in flight, reconnecting by themselves
    readback.py   reads a volume back and judges it by the journal
    scenario.py   the steps, one after the other, and what each of them has to show
    report.py     what is told while it runs, and the figures at its end

Rules:
- Nothing is simulated. The daemons are `mirrorpair run` and `mirrorpair witness`; the volume is reached through NBD
  alone; what is killed is killed by SIGKILL.
- The verdict rests on contents and counts. Times are printed, never judged; only a hang has a limit.
- A check that had nothing to look at is a failure: without writes, or
  without writes that wait in the negative control, nothing would have been shown.
- However it ends, its processes have ended and what it made is removed, unless it was to be kept.
"""
