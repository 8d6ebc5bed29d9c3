"""The command ``t2t-fast`` inside the test process."""

from t2t_fast import cli


def run(capsys, *argv):
    """Exit code, standard output and standard error of the command."""
    code = cli.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
