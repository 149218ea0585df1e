use super::*;

const KEYS: &[&str] = &["size", "shared", "file", "n"];

fn parse(text: &str) -> Result<OptionText, OptionError> {
    OptionText::parse("--opt", KEYS, text)
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn an_empty_text_has_nothing() {
    assert_eq!(parse("").unwrap().text("size"), None);
}

#[test]
fn sizes_toggles_numbers() {
    let text = parse("size=3k,shared=TRUE,n=7").unwrap();
    assert_eq!(text.size("size").unwrap(), Some(3072));
    assert_eq!(text.toggle("shared").unwrap(), Some(true));
    assert_eq!(text.number("n", 1, 8).unwrap(), Some(7));
    assert_eq!(
        text.number("n", 1, 6).unwrap_err().to_string(),
        "--opt: n=7 is wrong; a number from 1 to 6 is allowed"
    );
}

#[test]
fn sizes_that_are_none() {
    for wrong in [
        "",
        "M",
        "-1",
        "+1",
        "1.5G",
        "1GB",
        "0x10",
        "99999999999999T",
        "1 M",
    ] {
        assert_eq!(parse_size(wrong), None, "{wrong}");
    }
    assert_eq!(parse_size("16T"), Some(16 << 40));
}

#[test]
fn brackets_and_quotes_keep_their_commas() {
    let text = parse(r#"file="a,b",size=[1,"2,3",4]"#).unwrap();
    assert_eq!(text.text("file"), Some("a,b"));
    assert_eq!(text.list("size").unwrap().unwrap(), ["1", "2,3", "4"]);
    assert_eq!(parse("n=1").unwrap().list("n").unwrap().unwrap(), ["1"]);
}

#[test]
fn a_value_may_hold_an_equals_sign() {
    assert_eq!(parse("file=/a=b").unwrap().text("file"), Some("/a=b"));
}

#[test]
fn an_empty_value_is_the_default() {
    assert_eq!(parse("file=").unwrap().text("file"), None);
    assert_eq!(
        parse("file=")
            .unwrap()
            .required("file")
            .unwrap_err()
            .to_string(),
        "--opt: file is missing"
    );
}

#[test]
fn mistakes_are_named() {
    assert_eq!(
        error("siez=1"),
        "--opt: unknown key \"siez\"; it has size, shared, file, n"
    );
    assert_eq!(error("size=1,size=2"), "--opt: size is given twice");
    assert_eq!(error("size"), "--opt: size needs a value, as in size=VALUE");
    assert_eq!(
        error("size=1,"),
        "--opt: unknown key \"\"; it has size, shared, file, n"
    );
    assert!(error("size=[1,2").starts_with("--opt: a [ without its ]"));
    assert!(error("size=1]").starts_with("--opt: a ] without its ["));
    assert!(error("file=\"x").contains("quotation mark"));
}
