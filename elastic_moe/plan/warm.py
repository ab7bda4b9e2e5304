"""Entry point of `python -m elastic_moe.plan.warm`; the work is done by `elastic_moe.runtime.warm_planner`."""

from elastic_moe.runtime.warm_planner import main

if __name__ == "__main__":
    main()
