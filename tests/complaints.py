"""What a command line that cannot be done says."""

from rope_fused import cli


def complaint(capsys, *arguments):
    """(exit status, not 0, and the one line on stderr) of a command line that cannot be done."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as leaving:
        status = leaving.code
    out, err = capsys.readouterr()
    assert out == "" and status
    (line,) = err.splitlines()
    return status, line
