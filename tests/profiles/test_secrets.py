"""Secrets: a profile names the variable that has one; messages never repeat a written secret."""

from pathlib import Path

import pytest

from kvcache.profiles import ProfileError, open_stack
from kvcache.profiles.errors import show, show_option
from kvcache.profiles.options import options_of
from kvcache.sizes import Size
from tests.support.empty_tiers import Front
from tests.support.profile_files import FRONT, GOOD, HEAD, only_problem, problems, read

pytestmark = pytest.mark.usefixtures("ten_gib")

SECRET = "hunter2-correct-horse"


class Guarded(Front):
    """Reads its password from a variable, and has options that resemble secrets."""

    def __init__(
        self, *, block_nbytes: int, password_env: str = "", token_file: str = "",
        block_tokens: int = 1, tokenizer: str = "", bypass: str = "", home: str = "",
        use_auth: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(block_nbytes=block_nbytes, room=Size(1))


class Open(Front):
    """Takes a secret as an option."""

    def __init__(self, *, block_nbytes: int, password: str) -> None:
        super().__init__(block_nbytes=block_nbytes, room=Size(1))


def with_option(name: str) -> type:
    """A class with an option of this name, which is a string."""
    scope: dict[str, type] = {}
    exec(f"class Odd:\n def __init__(self, *, {name}: str = ''): pass\n", {}, scope)
    return scope["Odd"]


@pytest.mark.parametrize(
    "name", ["password", "redis_password", "passwd", "secret", "secret_key", "api_key", "apikey",
             "access_key", "auth_token", "token", "credentials"],
)  # fmt: skip
def test_class_with_a_secret_option_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^Odd takes {name}, but .* with {name}_env, the name"):
        options_of(with_option(name))


def test_secret_option_is_reported_at_the_kind(file: Path) -> None:
    text = HEAD.replace(FRONT, "tests.profiles.test_secrets:Open") + f'password = "{SECRET}"\n'
    problem = only_problem(file, text)
    assert problem.startswith(f'{file}, line 3: kind = "tests.profiles.test_secrets:Open": Open ')
    assert "a profile must not hold a secret" in problem


def test_options_that_resemble_secrets_are_accepted(file: Path) -> None:
    assert list(options_of(Guarded)) == [
        "password_env", "token_file", "block_tokens", "tokenizer", "bypass", "home", "use_auth",
    ]  # fmt: skip
    text = HEAD.replace(FRONT, "tests.profiles.test_secrets:Guarded")
    row = read(file, text + 'password_env = "KV_PASSWORD"\n').tiers[0]
    assert row.options == {"password_env": "KV_PASSWORD"}
    assert row.settings[0].where == f'{file}, line 4: password_env = "KV_PASSWORD"'


def test_password_in_place_of_a_variable_name_is_refused_and_not_repeated(file: Path) -> None:
    text = HEAD.replace(FRONT, "tests.profiles.test_secrets:Guarded")
    problem = only_problem(file, text + f'password_env = "{SECRET}"\n')
    assert problem == (
        f"{file}, line 4: password_env = ***: "
        "takes the name of the environment variable that has the secret"
    )


def test_password_in_a_url_is_refused_and_not_repeated(file: Path) -> None:
    problem = only_problem(file, GOOD + f'path = "redis://:{SECRET}@host"\n')
    assert problem.startswith(f'{file}, line 5: path = "redis://***@host": holds a password')
    problem = only_problem(file, GOOD, {"KVCACHE__L1__PATH": f"redis://me:{SECRET}@host"})
    assert "password_env" in problem
    assert SECRET not in problem
    for text in ("redis://me@host:6379/1", "/a:b@c", "redis://host:6379"):
        assert read(file, GOOD + f'path = "{text}"\n').tiers[0].options["path"] == text


WRITTEN = [
    f'password = "{SECRET}"\n',
    f'pasword = "{SECRET}"\n',
    f'db_Passwd = "{SECRET}"\n',
    f'auth_token = "{SECRET}"\n',
    f'url = "redis://me:{SECRET}@host"\n',
    f'path = ["redis://{SECRET}@host"]\n',
    f'login = {{ password = "{SECRET}", user = "me" }}\n',
    f'logins = [{{ secret = "{SECRET}" }}]\n',
    f'password_env = "{SECRET}"\n',
]


@pytest.mark.parametrize("line", WRITTEN)
def test_problems_contain_no_secret(file: Path, line: str) -> None:
    for text in (GOOD + line, line + GOOD, f"without = [{{ {line.strip()} }}]\n" + GOOD):
        for problem in problems(file, text):
            assert SECRET not in problem
            assert problem.startswith(f"{file}, line ")


def test_messages_contain_no_secret_of_a_variable(file: Path) -> None:
    for variable in ("KVCACHE__L1__PASSWORD", "KVCACHE__REDIS__PASSWORD", "KVCACHE__L1__TOKEN"):
        problem = only_problem(file, GOOD, {variable: SECRET})
        assert SECRET not in problem
        assert variable in problem


def test_value_that_is_no_secret_is_shown() -> None:
    assert show({"a": [1, "b"]}) == '{"a": [1, "b"]}'
    assert show("redis://host:6379/1") == '"redis://host:6379/1"'
    assert show_option("path", "/a@b") == 'path = "/a@b"'
    assert show_option("token_file", "/run/token") == 'token_file = "/run/token"'


class Talkative(Front):
    """Raises an error that contains the value of another option."""

    def __init__(self, *, block_nbytes: int) -> None:
        raise ValueError(f"cannot reach redis://me:{SECRET}@host: password={SECRET}\x1b[31m")


def test_error_of_a_class_has_no_secret(file: Path) -> None:
    file.write_text(HEAD.replace(FRONT, "tests.profiles.test_secrets:Talkative"))
    with pytest.raises(ProfileError) as caught:
        open_stack(str(file), block_nbytes=4096)
    (problem,) = caught.value.problems
    assert problem.startswith(f'{file}, line 1: tier "l1": cannot reach redis://***@host: ')
    assert SECRET not in problem
    assert problem.isprintable()
