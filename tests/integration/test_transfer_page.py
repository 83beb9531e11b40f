"""The study's page is what its kept trials say, and every comparison on it is of the same model and text."""

from examples.reproduction.transfer import study
from examples.reproduction.transfer.report import PAGE, Report, fira_like, gain_trials, page
from examples.reproduction.transfer.trials import Trials


def test_page_is_written_from_the_kept_trials():
    assert PAGE.read_text() == page(Trials())


def test_every_trial_has_a_key_of_its_own():
    trials = set(study.trials())
    assert len({trial.key for trial in trials}) == len(trials)


def test_compared_trials_differ_in_the_method_alone():
    for trial in gain_trials():
        other = fira_like(trial)
        assert other.method == "fira"
        assert (other.width, other.depth, other.rank, other.steps, other.text, other.seed) == (
            trial.width,
            trial.depth,
            trial.rank,
            trial.steps,
            trial.text,
            trial.seed,
        )


def test_tuned_rate_is_chosen_by_validation_not_by_test():
    store = Trials()
    report = Report(store)
    family = report.family(study.preset(128, study.RANKS[0]))
    best, _ = report.tuned(family[0])
    assert all(store[best]["validation"] <= (store[one]["validation"] or float("inf")) for one in family)
