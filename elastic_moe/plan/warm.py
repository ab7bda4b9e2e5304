"""Entry point of `python -m elastic_moe.plan.warm`; the work is done by `elastic_moe.runtime.warm_planner`."""

from elastic_moe.runtime.warm_planner import warm_up

if __name__ == "__main__":
    warm_up()
