# The nixlet package, for nixpkgs' callPackage.
{ python3Packages }:
let
  project = (builtins.fromTOML (builtins.readFile ../pyproject.toml)).project;
  # The packages' names there are those of PyPI; which of their versions there is, nixpkgs has decided.
  packageOf = requirement: python3Packages.${builtins.head (builtins.match "([a-z0-9-]+).*" requirement)};
in
python3Packages.buildPythonApplication {
  pname = project.name;
  inherit (project) version;
  pyproject = true;
  src = builtins.path {
    name = "nixlet-source";
    path = ../.;
    filter =
      path: _:
      let
        file = builtins.substring (builtins.stringLength (toString ../.) + 1) (-1) path;
      in
      baseNameOf file != "__pycache__"
      && builtins.match "LICENSE|README\\.md|pyproject\\.toml|src(/.*)?" file != null;
  };
  build-system = [ python3Packages.hatchling ];
  dependencies = map packageOf project.dependencies;
  pythonRelaxDeps = true;
  pythonImportsCheck = [ "nixlet" ];
  meta = {
    inherit (project) description;
    mainProgram = "nixlet";
  };
}
