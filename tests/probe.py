"""Runs a script as `python script ...` does, and looks at it from inside. With GRADIENTS=path it saves each step's
gradients to path-RANK.pt; with KILL_AT=n it kills itself, SIGKILL, at its n-th call of os.fsync or os.replace, which is
what saving consists of; with START_METHOD=spawn its worker processes start as they do on a Mac and on Windows."""

import multiprocessing
import os
import runpy
import signal
import sys

import torch

if __name__ == "__main__":  # a spawned worker imports this file too, under another name
    if "GRADIENTS" in os.environ:
        clip = torch.nn.utils.clip_grad_norm_

        def save_and_clip(parameters, *rest):
            parameters = list(parameters)
            gradients = [p.grad.clone() for p in parameters if p.grad is not None]
            torch.save(gradients, f"{os.environ['GRADIENTS']}-{os.environ.get('RANK', 0)}.pt")
            return clip(parameters, *rest)

        torch.nn.utils.clip_grad_norm_ = save_and_clip

    if "KILL_AT" in os.environ:
        calls = 0

        def killing(call):
            def counted(*args, **kwargs):
                global calls
                calls += 1
                if calls == int(os.environ["KILL_AT"]):
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return counted

        os.fsync, os.replace = killing(os.fsync), killing(os.replace)

    if "START_METHOD" in os.environ:
        multiprocessing.set_start_method(os.environ["START_METHOD"])

    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
