"""Lists packages of Debian that hold Latin fonts, for the data set `glyphs`, and installs them.

    python experiments/data/fonts.py              # prints the command, which downloads about 170 MB
    sudo python experiments/data/fonts.py --install

Then `distill_jax.data.load("glyphs")` renders them. Each font has its own licence, in
`/usr/share/doc/fonts-.../copyright`; most have the SIL Open Font Licence.
"""

import argparse
import shlex
import shutil
import subprocess
import sys

# Each gives glyphs at least one face (Debian 12), all together about 1,490 of 670 families; the names begin with fonts-
PACKAGES = """
3270 adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris adf-mekanus
adf-oldania adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis adf-verana aenigma agave
allerta amiga anonymous-pro apropal arapey arkpandora arundina atarismall averia-gwf averia-sans-gwf
averia-serif-gwf b612 babelstone-modern beteckna blankenburg breip bwht cabin cabinsketch cantarell cardo
cegui century-catalogue cherrybomb clear-sans cmu comfortaa comic-neue compagnon courier-prime croscore
crosextra-caladea crosextra-carlito dancingscript dejavu-core dejavu-extra dosis dustin ebgaramond elstob
engadget essays1743 eurofurence evertype-conakry fantasma fantasque-sans fanwood femkeklaver ferrite-core
firacode freefont-ttf gamaliel gemunu-libre georgewilliams gfs-artemisia gfs-didot gfs-neohellenic
gfs-theokritos glasstty gnutypewriter go gotico-antiqua goudybookletter hack havana hermit hosny-amiri
humor-sans inconsolata inter isabella jetbrains-mono johnsmith-induni junction junicode jura karla karmilla
kaushanscript klaudia-berenika lato le-murmure league-mono league-spartan leckerli-one lemonada
lg-aboriginal liberation lindenhill linex linuxlibertine lobstertwo manrope millimetre misaki monofur monoid
mononoki mplus national-park noto-mono ocr-a ocr-b okolaks oldstandard open-sans opendin opendyslexic
osifont oxygen paratype pc play prociono proggy quattrocento quicksand radisnoir rit-sundar roadgeek
roboto-slab roboto-unhinted routed-gothic rufscript sil-andika sil-charis sil-doulos sil-galatia sil-gentium
sil-gentiumplus sil-harmattan sixtyfour sjfonts smc-chilanka smc-gayathri smc-manjari solide-mirage sora
spleen staypuft stix summersby terminus tiresias tlwg-garuda-ttf tlwg-kinnari-ttf tlwg-laksaman-ttf
tlwg-loma-ttf tlwg-mono-ttf tlwg-norasi-ttf tlwg-purisa-ttf tlwg-sawasdee-ttf tlwg-umpush-ttf tlwg-waree-ttf
triod-postnaja tuffy uralic urw-base35 vollkorn yanone-kaffeesatz yrsa-rasa
"""


def known(packages: list[str]) -> list[str]:
    """Returns the packages that this release of the system has."""
    found = subprocess.run(["apt-cache", "pkgnames", "fonts-"], capture_output=True, text=True, check=True)
    return sorted(set(packages) & set(found.stdout.split()))


def main() -> None:
    """Prints the command that installs the packages, or runs it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="run the command instead of printing it")
    options = parser.parse_args()
    packages = [f"fonts-{name}" for name in PACKAGES.split()]
    if shutil.which("apt-cache"):
        packages, absent = known(packages), sorted(set(packages) - set(known(packages)))
        if absent:
            print(f"not in this release: {', '.join(absent)}", file=sys.stderr)
    elif options.install:
        sys.exit(
            "error: --install needs apt-get, which Debian and Ubuntu have: copy fonts into a folder instead"
        )
    if not packages:
        sys.exit("error: apt knows none of the packages: run apt-get update first")
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
    if not options.install:
        print(shlex.join(command))
    elif status := subprocess.run(command).returncode:
        sys.exit(f"error: apt-get ended with status {status}: it needs root, and apt-get update before")


if __name__ == "__main__":
    main()
