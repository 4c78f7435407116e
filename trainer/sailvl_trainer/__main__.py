"""`python -m sailvl_trainer`: a worker, by its environment (contract.Env)."""

from sailvl_trainer.runtime.entry import main

if __name__ == "__main__":
    main()
