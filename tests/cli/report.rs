//! The page of a sweep: what it holds, and how a browser shows it.

use crate::common::Place;
use crate::skip::skip;
use serde_json::Value;
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

/// Requests of a net log that go to a network.
fn requests(log: &Path) -> Vec<String> {
    let log: Value = serde_json::from_slice(&fs::read(log).unwrap()).unwrap();
    let events = log["events"].as_array().unwrap();
    let urls = events.iter().filter_map(|event| event["params"]["url"].as_str());
    urls.filter(|url| url.starts_with("http") || url.starts_with("ws")).map(str::to_string).collect()
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
        let log = place.path(&format!("{name}.json"));
        let mut flags = vec![
            format!("--screenshot={}", picture.display()),
            format!("--log-net-log={}", log.display()),
            format!("--window-size={width},2400"),
        ];
        flags.extend(dark.then(|| "--blink-settings=preferredColorScheme=0".to_string()));
        let output = browse(&browser, &profile, &page, &flags);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !told.contains("CONSOLE"), "{told}");
        assert_eq!(requests(&log), [""; 0]);
        let bytes = fs::read(&picture).unwrap();
        assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 20_000, "{} bytes", bytes.len());
    }

    // A frame as wide as a small phone tells its own width and that of its contents.
    let told = "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth, \
                getComputedStyle(document.querySelector('.results td')).display].join(' '), '*')</script>";
    place.write("phone.html", place.read("out/report.html").replace("</body>", &format!("{told}</body>")));
    place.write(
        "frame.html",
        "<body><p id=p>nothing</p><script>onmessage = event => { p.textContent = 'frame ' + event.data }</script>\
         <iframe src=phone.html style='width:360px;height:640px;border:0'></iframe></body>",
    );
    let output = browse(&browser, &profile, &place.path("frame.html"), &["--dump-dom".to_string()]);
    let dom = String::from_utf8_lossy(&output.stdout);
    assert!(dom.contains("frame 360 360 flex"), "{dom} {}", String::from_utf8_lossy(&output.stderr));
}
