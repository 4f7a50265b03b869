//! The page of a sweep: what it holds, and how a browser shows it.

use crate::common::Place;
use crate::skip::skip;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const GRID: &str = r#"
[train]
preset = "toy"
backend = "cpu"
batch-size = 1
seq-len = 16
steps = 12
warmup = 1
val-every = 3
val-batches = 1
sample-tokens = 60

[[grid]]
pattern = ["dense", "band", "small-dense"]
bandwidth = [128, "256..64"]
layers = ["fc1"]
seed = [1, 2]

[[grid]]
pattern = ["dense"]
learning-rate = [1e38]
"#;

/// A sweep's folder `out` with finished runs and one that failed.
fn swept() -> Place {
    let place = Place::new();
    place.write("grid.toml", GRID.replace("warmup = 1", "warmup = 0"));
    let output = place.command("sweep grid.toml --output out").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    place
}

#[test]
fn the_page_holds_everything_and_is_made_again() {
    let place = swept();
    let page = place.read("out/report.html");
    for part in [
        "10 of 11 runs done, 1 failed",
        "Validation loss over steps.",
        "Validation loss over time.",
        "Validation loss at the end over density.",
        "Training loss over steps.",
        "band-fc1-256..64",
        "the training diverged",
        "band, bandwidth 128",
        "band, bandwidth 192",
        "small-dense, width 320 of 512",
        "dense-s1, step 12",
        "a processor&#x27;s energy is not measured",
    ] {
        assert!(page.contains(part), "'{part}' is missing");
    }
    assert_eq!(page.matches("class=\"chart\"").count(), 4);
    assert!(!page.contains("http://") || page.replace("http://www.w3.org/2000/svg", "").find("http").is_none());
    fs::remove_file(place.path("out/report.html")).unwrap();
    place.ok("report out");
    assert_eq!(place.read("out/report.html"), page);
    place.ok("report out -o other.html");
    assert_eq!(place.read("other.html"), page);
    place.mistake("report .", "cannot open ./results.json");
    place.write("results.json", "{}");
    place.mistake("report .", "is not what a sweep wrote");
}

/// A browser of Chromium's kin.
fn browser() -> Option<PathBuf> {
    let names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell"];
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name))).find(|file| file.is_file())
}

/// Runs the browser without a window on a page.
fn browse(browser: &Path, profile: &Path, page: &Path, flags: &[String]) -> Output {
    let profile = format!("--user-data-dir={}", profile.display());
    let fixed = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-default-apps",
        "--disable-sync",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
        &profile,
    ];
    let url = format!("file://{}", page.display());
    Command::new(browser).args(fixed).args(flags).arg(url).stdin(Stdio::null()).output().unwrap()
}

/// What a page in a frame as wide as a small phone tells of itself: width of the frame and of its contents, how the table lies,
/// how many files it asked for; and whether the console has a word on it.
fn in_a_phone(browser: &Path, place: &Place, page: &str) -> (String, bool) {
    let tell = "<script>onload = () => parent.postMessage([innerWidth, document.documentElement.scrollWidth, \
                getComputedStyle(document.querySelector('.results td')).display, \
                performance.getEntriesByType('resource').length].join(' '), '*')</script></body>";
    place.write("phone.html", page.replace("</body>", tell));
    place.write(
        "frame.html",
        "<body><p id=p>nothing</p><script>onmessage = event => { p.textContent = 'frame ' + event.data + '.' }</script>\
         <iframe src=phone.html style='width:360px;height:640px;border:0'></iframe></body>",
    );
    let output = browse(browser, &place.path("profile"), &place.path("frame.html"), &["--dump-dom".to_string()]);
    let dom = String::from_utf8_lossy(&output.stdout);
    let told = dom.split("<p id=\"p\">").nth(1).and_then(|rest| rest.split("</p>").next());
    let stderr = String::from_utf8_lossy(&output.stderr);
    (told.unwrap_or_else(|| panic!("{dom} {stderr}")).to_string(), stderr.contains("CONSOLE"))
}

#[test]
fn a_browser_shows_the_page_on_a_desk_and_on_a_phone() {
    let Some(browser) = browser() else {
        return skip("chromium", "no Chromium is installed (apt-get install chromium)");
    };
    let place = swept();
    let profile = place.path("profile");
    let folder = std::env::var_os("BANDTRAIN_SCREENSHOTS").map_or_else(|| place.path("pictures"), PathBuf::from);
    fs::create_dir_all(&folder).unwrap();
    let page = place.path("out/report.html");
    for (name, width, dark) in [("desk", 1280, false), ("dark", 1280, true), ("phone", 500, false)] {
        let picture = folder.join(format!("{name}.png"));
        let mut flags = vec![format!("--screenshot={}", picture.display()), format!("--window-size={width},3600")];
        flags.extend(dark.then(|| "--blink-settings=preferredColorScheme=0".to_string()));
        let output = browse(&browser, &profile, &page, &flags);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !told.contains("CONSOLE"), "{told}");
        let bytes = fs::read(&picture).unwrap();
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 20_000, "{} bytes", bytes.len());
    }

    let html = place.read("out/report.html");
    assert_eq!(in_a_phone(&browser, &place, &html), ("frame 360 360 flex 0.".to_string(), false));
    // A page that is too wide, asks the network for a file and writes to the console is told from that.
    let wrong =
        "<img src='http://127.0.0.1:9/x.png' style='width:700px;height:9px'><script>console.error(1)</script></body>";
    let other = html.replace("</body>", wrong);
    assert_eq!(in_a_phone(&browser, &place, &other), ("frame 360 716 flex 1.".to_string(), true));
}
