"""Benchmarks: mirrorpair beside the least work possible (floors in C) and beside the tools people use today.

    pytest bench --benchmark-only                     # 4 GiB images, about an hour on two cores
    MIRRORPAIR_BENCH_SIZE=256MiB pytest bench --benchmark-only
    pytest bench --benchmark-only -k "warm-1pct-4KiB" # one group; -k rsync: one tool and what it is compared with
    pytest bench/bench_live.py --benchmark-only       # the live mirror alone: real daemons, fio, resyncs
    python -m bench.plot bench/results/latest.json    # the same as a picture

Rules:
- A figure is only worth something beside another one from the same run: all subjects of a group take turns on the
  same files.
- Every run's result is compared with the source afterwards; a wrong one fails its benchmark, whatever its time. What is
  served while it is measured is compared when its group ends: both images of a mirror hold the same bytes.
- A goal that is missed is printed as missed. It never fails the run: the machine may be busy.

Settings are environment variables, see `settings.py`.
"""
